"""Latents refined for one picture while it is encoded: fewer bits, the decoder and files as ever.

Analysis is a network that serves all pictures in one pass. What this picture costs, in bits and in
error, depends on its latents alone, and the way back has gradients; so some steps of descent find
better latents than the network gave (Campos et al. 2019, "Content adaptive optimization for neural
image compression"). Rounding is annealed as in Yang, Bamler and Mandt 2020 (`ops.quantise`).

    bits + λ · squared error        for the eye: λ is what the model itself pays at this quality
    bits + cost(image or feature)   for a machine: whatever an `Aim` says, as `measure.aimed` does

Of codecs with several outputs those latents are refined for an image that nothing else is made of,
so that a base layer stays what it is; for a feature all that it is made of, and its bits alone.

Steps are taken in floats, with the networks that the integers of a frozen codec stand for, and in
windows (`tiles`); neighbouring ones share a margin in which each sees its own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.codecs import programs, tiles, walk
from icm_jax.codecs.codec import Causal, Codec, forward
from icm_jax.codecs.tiles import Part
from icm_jax.errors import IcmError

if TYPE_CHECKING:
    from icm_jax.codecs.bitstream import FrozenCodec

STEPS = (0, 50, 120, 400)
"""Of each effort."""
MARGIN = 64
"""Pixels of a window beside what is kept of it; a multiple of what a hyper-latent stands for."""
_RATE = 0.01
"""Of Adam, from which it falls to a tenth along a cosine."""
_HOTTEST, _COLDEST, _DECAY = 0.5, 0.1, 4.0
"""Temperatures: the first, for a quarter of the steps, then falling e-fold in 1 / _DECAY of all."""
_APART = 0.03
"""Of qualities between which λ is the slope of the error over the bits."""


class Aim(NamedTuple):
    """Something else than the eye for which a picture is coded.

    Attributes:
      cost: (variables, output float32 [1, h, w, C]) -> what its flaws are worth, in bits, float32
        []. Its `repr` names it among compiled programs. variables: arrays on the host.
      output: of the codec: "image", on 0...255, or "feature", of the image padded to the grid.
    """

    cost: Callable[[Any, jax.Array], jax.Array]
    variables: Any
    output: str = "image"


class _Wanted(NamedTuple):
    """What latents are refined for.

    Attributes:
      output: of the codec. segments: whose latents change. layers: whose bits count.
      cost: of an aim, or None. shape: of the output, (height, width).
    """

    output: str
    segments: tuple[str, ...]
    layers: int
    cost: Callable[[Any, jax.Array], jax.Array] | None
    shape: tuple[int, int]


def refined(
    frozen: "FrozenCodec",
    image: np.ndarray,
    latents: Mapping[str, np.ndarray],
    condition: Mapping[str, np.ndarray],
    steps: int,
    aim: Aim | None = None,
    windows: Sequence[tiles.Size] = tiles.SIZES,
) -> dict[str, np.ndarray]:
    """Latents that cost less, all in all, than those given, or these.

    Args:
      image: uint8 [1, H, W, 3]. latents: of it, as `walk.analyse` gives them.
      condition: "quality". steps: how many, of all latents of a window.
      aim: what for; then the image is taken in one window. None: the eye.

    Raises: IcmError for a codec of one rate, whose λ nobody knows, or one that has no tiling or not
      the output.
    """
    import tqdm

    tiling, output = frozen.codec.tiling, "image" if aim is None else aim.output
    if tiling is None or output not in frozen.codec.outputs:
        raise IcmError(f"this model's latents cannot be refined: it has no tiling, or no {output}")
    codec, variables = thawed(frozen)
    price = np.float32(0)
    if aim is None:
        price = _price(frozen, image, condition, windows)
    shape, padded = image.shape[1:3], ops.pad_to(image, tiling.grid)
    real = np.zeros((1, *padded.shape[1:3], 1), np.uint8)
    real[:, : shape[0], : shape[1]] = 1
    y = np.concatenate([latents[name] for name in tiling.segments], axis=-1)
    given = {"image": (padded, 1), "real": (real, 1), "latent": (y, tiling.factor)}
    sides = padded.shape[1:3]
    if aim is not None:
        windows = (tiles.one_window(sides, MARGIN),)
    weights = variables if aim is None else (variables, jax.device_put(aim.variables))
    static = codec, _wanted(codec, output, aim and aim.cost, shape, sides)

    def of_window(part: Part):
        """y before and after, and what each position of both costs."""
        zeros = jnp.zeros(part.arrays["latent"].shape, jnp.float32)
        state = _Adam(jnp.asarray(part.arrays["latent"]), zeros, zeros)
        for step in tqdm.tqdm(range(steps), "refining", leave=False, disable=None):
            inputs = part, condition, state, price, _schedule(step, steps)
            state = programs.run(_refining_step, static, weights, inputs)
        found = np.asarray(state.y)
        costs = [
            programs.run(_costs_of_latents, static, weights, (part, condition, y, price))
            for y in (part.arrays["latent"], found)
        ]
        return found, *costs

    halo = MARGIN if aim is None else 0
    found, before, after = tiles.in_windows(of_window, given, sides, tiling.factor, halo, windows)
    if after.sum(dtype=np.float64) >= before.sum(dtype=np.float64):
        return dict(latents)
    slices = walk.slices(codec, tiling.segments, found)
    return slices | walk.rest_of(frozen.codec, frozen.on_device, found, condition, windows)


def _wanted(codec: Codec, output: str, cost, shape: tiles.Size, padded: tiles.Size) -> _Wanted:
    """Args: shape, padded: sides of the image, and as the codec pads it."""
    assert codec.tiling
    reads = {back.output: back for back in codec.tiling.back}
    own = reads[output].segments
    layers = 1 + max(segment.layer for segment in codec.segments if segment.name in own)
    if output == "image":
        others = {n for back in codec.tiling.back if back.output != output for n in back.segments}
        own = tuple(name for name in own if name not in others)
    else:
        shape = padded[0] // reads[output].step, padded[1] // reads[output].step
    return _Wanted(output, own, layers, cost, shape)


def steps_of(effort: int) -> int:
    """Raises: IcmError for an effort that is none of 0 to 3."""
    if effort not in range(len(STEPS)):
        raise IcmError(f"an effort is one of 0 to {len(STEPS) - 1}, not {effort!r}")
    return STEPS[effort]


@functools.lru_cache(2)
def thawed(frozen: "FrozenCodec") -> tuple[Codec, Any]:
    """A frozen codec with priors in floats, and the variables that they need, on the device.

    Raises: IcmError for a `Causal` prior, in windows of which positions lack those before them.
    """
    if any(isinstance(segment.prior, Causal) for segment in frozen.codec.segments):
        raise IcmError("this model's latents cannot be refined: it has a context model")
    segments = tuple(s._replace(prior=s.real or s.prior) for s in frozen.codec.segments)
    device = jax.local_devices()[0]
    return frozen.codec._replace(segments=segments), jax.device_put(floats(frozen), device)


def floats(frozen: "FrozenCodec") -> dict:
    """Variables of a frozen codec, all of its networks in floats: {collection: ... arrays}, but for
    those of a kind of prior that cannot go back."""
    variables = dict(frozen.variables)
    integers = variables.pop("integer", {})
    flat: dict = flax.traverse_util.flatten_dict(variables)
    channels = {segment.name: segment.shape(1, 1)[2] for segment in frozen.codec.segments}
    for segment in frozen.codec.segments:
        if segment.thaw is not None and segment.name in integers:
            network = segment.thaw(integers[segment.name], channels)
            named = flax.traverse_util.flatten_dict(network)
            flat |= {("params", *segment.spent, *name): leaf for name, leaf in named.items()}
    return flax.traverse_util.unflatten_dict(flat)


def _price(frozen: "FrozenCodec", image, condition, windows) -> np.float32:
    """λ: bits that the model gives for a squared error less by 1, about this quality."""
    if not frozen.codec.qualities:
        raise IcmError("this model has one rate, and does not say what an error is worth to it")
    tiling = frozen.codec.tiling
    assert tiling
    codec, variables = thawed(frozen)
    at = np.clip(float(condition["quality"][0]), _APART, 1 - _APART)
    padded = ops.pad_to(image, tiling.grid)
    sides = padded.shape[1:3]
    wanted = _wanted(codec, "image", None, image.shape[1:3], sides)
    totals = []
    for quality in (at - _APART, at + _APART):
        near = {"quality": np.full(1, quality, np.float32)}
        latents = walk.analyse(frozen.codec, frozen.on_device, image, near, windows)
        y = np.concatenate([latents[name] for name in tiling.segments], axis=-1)
        real = np.ones((1, *padded.shape[1:3], 1), np.uint8)
        given = {"image": (padded, 1), "real": (real, 1), "latent": (y, tiling.factor)}

        def of_window(part: Part, near=near):
            inputs = part, near, part.arrays["latent"]
            return programs.run(_parts_of_costs, (codec, wanted), variables, inputs)

        maps = tiles.in_windows(of_window, given, sides, tiling.factor, MARGIN, windows)
        totals.append(maps.sum(axis=(0, 1, 2), dtype=np.float64))
    (bits, error), (more, less) = totals
    return np.float32(max(more - bits, 0.0) / max(error - less, 1e-9))


class _Adam(NamedTuple):
    """y [N, h, w, C] and its moments."""

    y: Any
    first: Any
    second: Any


class _Moment(NamedTuple):
    """Of a descent: the step's number from 1 on, its rate, its temperature."""

    number: np.int32
    rate: np.float32
    temperature: np.float32


def _schedule(step: int, steps: int) -> _Moment:
    at = step / steps
    rate = _RATE * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * at)))
    temperature = np.clip(_HOTTEST * np.exp(-_DECAY * (at - 0.25)), _COLDEST, _HOTTEST)
    return _Moment(np.int32(step + 1), np.float32(rate), np.float32(temperature))


# What is compiled: the codec and what else is fixed, variables, inputs.


def _refining_step(codec, wanted, variables, inputs):
    import optax  # here, for what is not refined does without

    part, condition, state, price, moment = inputs
    options = dict(key=jax.random.key(moment.number), temperature=moment.temperature)
    channels = {segment.name: segment.shape(1, 1)[2] for segment in codec.segments}
    moves = [np.full(channels[n], n in wanted.segments) for n in codec.tiling.segments]

    def total(y):
        y = jnp.where(np.concatenate(moves), y, jax.lax.stop_gradient(y))
        return _costs(codec, wanted, variables, part, condition, y, price, **options).sum()

    scale: Any = optax.scale_by_adam()
    own: Any = optax.ScaleByAdamState(moment.number - 1, state.first, state.second)
    with jax.numpy_dtype_promotion("standard"):  # which optax takes for granted
        update, own = scale.update(jax.grad(total)(state.y), own)
    return _Adam(state.y - moment.rate * update, own.mu, own.nu)


def _costs_of_latents(codec, wanted, variables, inputs):
    part, condition, y, price = inputs
    return _costs(codec, wanted, variables, part, condition, y, price)[..., None]


def _parts_of_costs(codec, wanted, variables, inputs):
    bits, image = _coded(codec, wanted, variables, *inputs)
    return jnp.stack([bits, _errors(codec, inputs[0], image)], axis=-1)


def _costs(codec, wanted, variables, part, condition, y, price, **options):
    """Of each position of y, in bits: float32 [N, h, w]."""
    own, others = (variables, None) if wanted.cost is None else variables
    bits, output = _coded(codec, wanted, own, part, condition, y, **options)
    if wanted.cost is None:
        return bits + price * _errors(codec, part, output)
    height, width = wanted.shape
    return bits + wanted.cost(others, output[:, :height, :width]) / bits[0].size


def _coded(codec, wanted, variables, part, condition, y, **options):
    """Bits of each position of y, float32 [N, h, w]; the output."""
    factor = codec.tiling.factor
    shape = tuple(factor * side for side in y.shape[1:3])
    segments = tuple(segment for segment in codec.segments if segment.layer < wanted.layers)
    outputs = {wanted.output: codec.outputs[wanted.output]}
    with tiles.within(part, "latent"):
        inputs = {"latent": y, **condition}
        seen = codec._replace(outputs=outputs, segments=segments)
        found = forward(seen, variables, inputs, shape, **options)
    height, width = y.shape[1:3]
    bits = jnp.zeros(y.shape[:3], jnp.float32)
    for values in found.maps.values():  # a hyper-latent's are spread over what it stands for
        times = -(-height // values.shape[1])
        spread = jnp.repeat(jnp.repeat(values, times, 1), times, 2) / times**2
        bits = bits + spread[:, :height, :width]
    bits = ops.clear_outside(bits[..., None], part.bounds["latent"])[..., 0]
    return bits, found.outputs[wanted.output]


def _errors(codec, part, image):
    """Squared errors of the pixels that each position of y stands for, float32 [N, h, w]."""
    error = jnp.square(image - part.arrays["image"].astype(jnp.float32)).sum(-1)
    return _gathered(error * part.arrays["real"][..., 0].astype(jnp.float32), codec.tiling.factor)


def _gathered(x, factor: int):
    """Sums over blocks: [N, H, W] -> [N, H/factor, W/factor]."""
    n, height, width = x.shape
    return x.reshape(n, height // factor, factor, width // factor, factor).sum((2, 4))
