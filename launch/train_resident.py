"""Trains an image codec on one accelerator from photographs that lie in its memory.

    python launch/train_resident.py --config photo --photos FOLDER --out DIR --seconds 540
    python launch/train_resident.py --config photo --photos FOLDER --out DIR --finish

Small networks take a batch in milliseconds, faster than cores decode JPEG. Here every photograph is
decoded once, at several sizes, into one array of the device; views are cut there, and many steps
are one program. Loss, networks and data are those of the last run of configs/hyperprior.py, scale
`--config`, in seconds in place of steps: the learning rate follows a cosine over the time that is
left. Every minute DIR gets the weights, their moving average and Adam's moments, four files; the
same command with another `--seconds` goes on from there. `--finish` writes DIR/codec.icmc.

It needs jax, flax, optax, ml_collections and Pillow.
"""

import argparse
import concurrent.futures
import functools
import io
import json
import math
import os
import pathlib
import sys
import time
import zipfile

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs import hyperprior
from icm_jax.codecs.codec import forward
from icm_jax.data import open_source
from icm_jax.tasks import build_task

SIZES = (1.0, 0.875, 0.75, 0.625, 0.5)
"""Shares of its sides at which a photograph is held, where a view fits in."""
CHUNK = 50  # steps of a program
SAVE_EVERY = 60.0  # seconds
HELD_OUT = 32  # crops
DECAY = 0.999
FILES = ("params", "ema", "mu", "nu")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", default="photo", help="scale of configs/hyperprior.py")
    parser.add_argument("--photos", required=True, help="folder; every fifth by name is held out")
    parser.add_argument("--out", required=True, help="folder of checkpoints and log")
    parser.add_argument("--start", help="folder of a checkpoint to go on from, if not --out")
    parser.add_argument("--seconds", type=float, default=540, help="after which it stops")
    parser.add_argument("--batch", type=int, default=16, help="crops of a step")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="steps of a program")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=1000, help="steps")
    parser.add_argument("--dtype", default="float32", help="of transforms, while training")
    parser.add_argument("--finish", action="store_true", help="write the codec file, train nothing")
    return parser.parse_args()


def photographs(data, split: str, size: int, sizes=SIZES, limit=None) -> list[np.ndarray]:
    """uint8 [H, W, 3] of a split's images at every size that holds a view."""
    source = open_source(data, split)

    def read(number):
        image = Image.open(io.BytesIO(source.load(number)["image"])).convert("RGB")
        found = []
        for share in sizes:
            sides = tuple(round(side * share) for side in image.size)
            if min(sides) >= size:
                smaller = image.resize(sides, Image.Resampling.LANCZOS) if share < 1 else image
                found.append(np.asarray(smaller))
        return found

    count = min(source.length, limit or source.length)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [image for found in pool.map(read, range(count)) for image in found]


def packed(images: list[np.ndarray]) -> dict[str, np.ndarray]:
    """All pixels in a row, uint32 [P], and of each image where it begins, its sides, and the share
    of all pixels up to its end."""
    pixels = np.empty(sum(image.shape[0] * image.shape[1] for image in images), np.uint32)
    begins, begin = [], 0
    for image in images:
        count = image.shape[0] * image.shape[1]
        red, green, blue = (image[..., i].reshape(-1).astype(np.uint32) for i in range(3))
        pixels[begin : begin + count] = red | green << 8 | blue << 16
        begins.append(begin)
        begin += count
    ends = np.array([*begins[1:], begin], np.float64) / begin
    sides = np.array([image.shape[:2] for image in images], np.int32)
    return dict(
        pixels=pixels,
        begins=np.array(begins, np.int32),
        sides=sides,
        ends=ends.astype(np.float32),
    )


def views(held, key, batch: int, size: int) -> jax.Array:
    """Random windows of random photographs, half of them transposed: uint8 [batch, size, size, 3].

    A photograph is drawn as often as it has pixels."""

    def one(key):
        keys = jax.random.split(key, 4)
        number = jnp.searchsorted(held["ends"], jax.random.uniform(keys[0]))
        number = jnp.minimum(number, len(held["ends"]) - 1)
        height, width = held["sides"][number]
        top = jax.random.randint(keys[1], (), 0, height - size + 1)
        left = jax.random.randint(keys[2], (), 0, width - size + 1)
        first = held["begins"][number] + top * width + left
        along, across = jnp.arange(size, dtype=jnp.int32), jnp.arange(size, dtype=jnp.int32) * width
        turned = jax.random.bernoulli(keys[3])
        rows, columns = jnp.where(turned, along, across), jnp.where(turned, across, along)
        found = held["pixels"][first + rows[:, None] + columns[None, :]]
        return jnp.stack([found >> shift & 255 for shift in (0, 8, 16)], -1).astype(jnp.uint8)

    return jax.vmap(one)(jax.random.split(key, batch))


def make_chunk(task, options, size: int):
    """(state, held, key, rate) -> (state, means of metrics) of `options.chunk` steps."""
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    def step(held, rate, state, key):
        keys = jax.random.split(key)
        batch = {"image": views(held, keys[0], options.batch, size)}

        def loss_of(params):
            variables = {"params": params, "constants": dict(task.constants)}
            return task.loss(variables, batch, keys[1], state["step"])

        (loss, aux), gradients = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
        moments = optax.ScaleByAdamState(state["count"], state["mu"], state["nu"])
        updates, (_, moved) = adam.update(gradients, (optax.EmptyState(), moments))
        rate = rate * jnp.minimum(1.0, (state["count"] + 1) / options.warmup)
        decay = jnp.minimum(DECAY, (state["step"] + 1.0) / (state["step"] + 10.0))
        params = jax.tree.map(lambda p, u: p - rate * u, state["params"], updates)
        ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state["ema"], params)
        norm = optax.global_norm(gradients)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        after = dict(params=params, ema=ema, mu=moved.mu, nu=moved.nu, count=moved.count)
        kept = {k: state[k] for k in after}
        after = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, kept)
        metrics = {"loss": loss, "norm": norm, **aux.metrics}
        metrics = {k: jnp.where(good, v, 0.0) for k, v in metrics.items()} | {"good": good}
        return after | {"step": state["step"] + 1}, metrics

    def chunk(state, held, key, rate):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(
            state["step"] + jnp.arange(options.chunk)
        )
        state, metrics = jax.lax.scan(functools.partial(step, held, rate), state, keys)
        good = jnp.maximum(metrics["good"].sum(), 1)
        return state, {k: v.sum() / good for k, v in metrics.items() if k != "good"} | {
            "skipped": (~metrics["good"]).sum()
        }

    return jax.jit(chunk, donate_argnums=0)


def make_score(codec):
    """(params, images, quality) -> bits per pixel and PSNR, rounded as decoding rounds."""

    def score(params, images, quality):
        shape = images.shape[1:3]
        inputs = {"image": images, "quality": jnp.full((len(images),), quality)}
        result = forward(codec, {"params": params}, inputs, shape)
        error = jnp.square(result.outputs["image"].clip(0, 255) - images).mean(axis=(1, 2, 3))
        bits = functools.reduce(jnp.add, result.bits.values()) / math.prod(shape)
        return bits.mean(), (10 * jnp.log10(255.0**2 / error)).mean()

    return jax.jit(score)


def flat(tree) -> dict[str, np.ndarray]:
    return flax.traverse_util.flatten_dict(jax.device_get(tree), sep="/")


def save(folder: pathlib.Path, state) -> None:
    """Four files, each whole or not at all."""
    for name in FILES:
        part = folder / f"{name}.part"
        with open(part, "wb") as file:
            np.savez(file, **flat(state[name]), **{k: state[k] for k in ("step", "count")})
        os.replace(part, folder / f"{name}.npz")


def load(folder: pathlib.Path, state):
    """`state` with what `save` wrote; moments of another step than the weights' are left out."""

    def read(name):
        with np.load(folder / f"{name}.npz") as file:
            found = {key: file[key] for key in file.files}
        numbers = {key: found.pop(key) for key in ("step", "count")}
        return flax.traverse_util.unflatten_dict(found, sep="/"), numbers

    params, numbers = read("params")
    state = state | {"params": params, "ema": params, "step": numbers["step"]}
    try:
        rest = {name: read(name) for name in FILES[1:]}
    except (OSError, ValueError, zipfile.BadZipFile):
        rest = {}
    if rest and all(found["step"] == numbers["step"] for _, found in rest.values()):
        state |= {name: tree for name, (tree, _) in rest.items()}
        state["count"] = numbers["count"]
    return jax.tree.map(jnp.asarray, state)


def initial(task, size: int):
    image = jnp.zeros((1, size, size, 3), jnp.uint8)
    params = jax.jit(lambda key: task.init(key, {"image": image})["params"])(jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = dict(params=params, ema=params, mu=zeros, nu=zeros)
    return jax.tree.map(jnp.copy, state) | dict(step=jnp.int32(0), count=jnp.int32(0))


def train(options, run) -> None:
    began, out, size = time.monotonic(), pathlib.Path(options.out), run.task.size
    out.mkdir(parents=True, exist_ok=True)
    score_task = build_task(run.task)
    task_fields = run.task.copy_and_resolve_references()
    task_fields.codec.dtype = options.dtype
    task = build_task(task_fields)
    say = functools.partial(tell, out / "log.jsonl", began)
    say(device=str(jax.devices()[0]), jax=jax.__version__, argv=sys.argv[1:])
    held = packed(photographs(run.data, "train", size))
    crops = [
        np.asarray(image)[-size:, -size:]
        for image in photographs(run.data, "validation", size, (1.0,), HELD_OUT)
    ]
    crops = jnp.asarray(np.stack(crops))
    say(pixels=len(held["pixels"]), images=len(held["ends"]), held_out=len(crops))
    held, state = jax.device_put(held), initial(task, size)
    start = pathlib.Path(options.start or options.out)
    if (start / "params.npz").is_file():
        state = load(start, state)
        say(resumed=int(state["step"]), moments=int(state["count"]))
    score, key = make_score(score_task.codec), jax.random.key(run.seed)
    chunk = make_chunk(task, options, size)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # both at once
        quality = jnp.float32(0)
        lowered = chunk.lower(state, held, key, quality), score.lower(state["ema"], crops, quality)
        chunk, score = pool.map(lambda program: program.compile(), lowered)
    say(compiled=True)

    def held_out(reason):
        for name in ("ema", "params"):
            pairs = [score(state[name], crops, jnp.float32(q)) for q in (0, 0.25, 0.5, 0.75, 1)]
            text = " ".join(f"{float(bits):.4f}/{float(psnr):.2f}" for bits, psnr in pairs)
            say(held_out=text, weights=name, step=int(state["step"]), reason=reason)

    held_out("start")
    origin = first = time.monotonic()
    deadline, told, saved = began + options.seconds, origin, origin
    reserve = 0.0  # seconds that the end takes, as the middle did
    while (now := time.monotonic()) < deadline - reserve:
        share = (now - first) / max(deadline - reserve - first, 1e-3)
        rate = options.rate * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        state, metrics = chunk(state, held, key, jnp.float32(rate))
        metrics = {name: float(value) for name, value in metrics.items()}
        now = time.monotonic()
        if now - told > 5:
            say(
                step=int(state["step"]),
                rate=rate,
                images_per_second=options.batch * options.chunk / (now - origin),
                **metrics,
            )
            told = now
        if now - saved > SAVE_EVERY:
            save(out, state)
            held_out("minute")
            saved = time.monotonic()
            reserve = 1.5 * (saved - now)
        origin = time.monotonic()
    save(out, state)
    held_out("end")


def tell(path: pathlib.Path, began: float, **facts) -> None:
    """A line of the log, on the screen as well."""
    facts = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in facts.items()}
    line = json.dumps({"seconds": round(time.monotonic() - began, 1), **facts})
    print(line, flush=True)
    with open(path, "a") as file:
        file.write(line + "\n")


def finish(options, run) -> None:
    """The codec file of the averaged weights, its integer networks calibrated on photographs."""
    from icm_jax.codecs import model_file
    from icm_jax.engine import frozen

    task, out = build_task(run.task), pathlib.Path(options.out)
    params = load(out, initial(task, run.task.size))["ema"]
    fields = {k: v for k, v in run.codec_file.items() if k != "weights"}
    codec = frozen.freeze(task.codec, {"params": jax.device_get(params)}, run)
    model_file.save(out / "codec.icmc", codec, **fields)
    print(out / "codec.icmc", codec.fingerprint.hex())


def main() -> None:
    options = arguments()
    config = hyperprior.get_config(options.config)
    config.data.path = options.photos
    run = hyperprior.runs(config)[-1]
    (finish if options.finish else train)(options, run)


if __name__ == "__main__":
    main()
