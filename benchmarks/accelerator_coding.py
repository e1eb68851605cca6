"""From pixels to .icm files and back with the model in the package, a batch at a time.

What bench_accelerator.py measures as "coding". The steps are those of `icm_jax.codecs.bitstream`,
of all images of a batch at once, and each is waited for, so that the time goes to one of

    network    analysis and hyper-analysis, table rows and means, synthesis: on the device
    transfer   between host and device, both ways
    coder      range coder, container: on the host, an image a thread
    host       what lies between them: rounding, subtraction, what a pass may see

What is written is read again, and must be what was written; table rows must be those that the CPU
computes, to the last bit.
"""

import contextlib
import functools
import os
import pathlib
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_cases import Case, count
from PIL import Image

from icm_jax import load
from icm_jax.codecs.bitstream import FrozenCodec
from icm_jax.codecs.codec import pass_masks, seen
from icm_jax.coding import container, range_coder

QUALITY = 60.0


class Phases(dict[str, float]):
    """Seconds by phase."""

    @contextlib.contextmanager
    def within(self, name: str):
        began = time.perf_counter()
        yield
        self[name] = self.get(name, 0.0) + time.perf_counter() - began


def pictures(folder: pathlib.Path | None, count: int, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [count, *shape, 3]: those of a folder of this size, again and again, or else smooth
    random ones."""
    found = []
    for path in sorted(folder.iterdir()) if folder else []:
        image = np.asarray(Image.open(path).convert("RGB"))
        found += [image] if image.shape[:2] == shape else []
    rng, size = np.random.default_rng(0), (shape[1], shape[0])
    while not found or (not folder and len(found) < count):
        noise = rng.integers(0, 256, (shape[0] // 8, shape[1] // 8, 3), np.uint8)
        found.append(np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)))
    return np.stack([found[n % len(found)] for n in range(count)])


class Programs:
    """A codec's parts, compiled for a batch of images of one size."""

    def __init__(self, frozen: FrozenCodec, images: np.ndarray):
        self.frozen, self.codec = frozen, frozen.codec
        self.variables, self.shape = frozen.on_device, images.shape[1:3]
        rows = len(images)
        self.quality = np.full(rows, QUALITY / 100, np.float32)
        given = {"image": images, "quality": self.quality}
        shapes = jax.eval_shape(self.codec.analyse, self.variables, given)
        self.analyse = jax.jit(self.codec.analyse).lower(self.variables, given).compile()
        decoded: dict = {"quality": self.quality}
        self.priors = []
        for number, segment in enumerate(self.codec.segments):
            latent = np.zeros(shapes[segment.name].shape, np.float32)
            program = jax.jit(self._prior(number, latent.shape))
            given = seen(segment, decoded, latent, np.zeros(latent.shape[1:], bool))
            self.priors.append(program.lower(self.variables, given).compile())
            decoded[segment.name] = latent
        self.decoded = decoded
        self.synthesise = jax.jit(self._image).lower(self.variables, decoded).compile()

    def _prior(self, number: int, shape):
        def prior(variables, decoded):
            found = self.codec.segments[number].prior(variables, decoded, shape)
            return found.index, found.mean

        return prior

    def _image(self, variables, decoded):
        image = self.codec.outputs["image"](variables, decoded, self.shape)
        return jnp.round(image.clip(0, 255)).astype(jnp.uint8)

    def same_on_cpu(self, decoded: dict) -> bool:
        """Whether the CPU chooses the same table rows and means for the first image, in the last
        pass of each segment."""
        first = {name: np.asarray(value)[:1] for name, value in decoded.items()}
        cpu = jax.local_devices(backend="cpu")[0]
        variables = jax.device_put(self.frozen.variables, cpu)
        before = ["quality"]
        for number, (segment, run) in enumerate(zip(self.codec.segments, self.priors, strict=True)):
            name, of_all, of_first = segment.name, dict(decoded), dict(first)
            known = ~pass_masks(segment, first[name].shape)[-1]
            for values in (of_all, of_first):
                latent = values[name] * known
                values |= seen(segment, {n: values[n] for n in before}, latent, known)
            names = [*before, *(() if segment.passes is None else (name, "known"))]
            there = jax.device_get(run(self.variables, {n: of_all[n] for n in names}))
            prior = self._prior(number, first[name].shape)
            given = jax.device_put({n: of_first[n] for n in names}, cpu)
            here = jax.device_get(jax.jit(prior)(variables, given))
            for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
                if not np.array_equal(one, other[:1]):
                    return False
            before.append(name)
        return True

    def in_passes(self, number: int, shape, decoded: dict, symbols_of, phases: Phases):
        """`walk.in_passes` for a batch, with the time of each phase: float32 of `shape`.

        Args: symbols_of: (table rows [N, n] of a pass, means [N, n]) -> int32 [N, n].
        """
        segment = self.codec.segments[number]
        values, known = np.zeros(shape, np.float32), np.zeros(shape[1:], bool)
        for mask in pass_masks(segment, shape):
            with phases.within("host"):
                given = seen(segment, decoded, values, known)
            with phases.within("transfer"):
                given = jax.block_until_ready(jax.device_put(given))
            with phases.within("network"):
                found = jax.block_until_ready(self.priors[number](self.variables, given))
            with phases.within("transfer"):
                index, mean = jax.device_get(found)
            with phases.within("host"):
                rows = np.broadcast_to(index, shape)[:, mask]
                means = np.float32(0) if mean is None else mean[:, mask]
            symbols = symbols_of(mask, rows, means)
            with phases.within("host"):
                values[:, mask] = symbols.astype(np.float32) + means
                known |= mask
        return values

    def encode(self, images: np.ndarray, pool, phases: Phases) -> tuple[list[bytes], dict]:
        """(files, the latents that they hold)."""
        with phases.within("transfer"):
            given = {"image": images, "quality": self.quality}
            given = jax.block_until_ready(jax.device_put(given))
        with phases.within("network"):
            latents = jax.block_until_ready(self.analyse(self.variables, given))
        with phases.within("transfer"):
            latents = jax.device_get(latents)
        decoded = {"quality": self.quality}
        strings: list[list[bytes]] = [[] for _ in images]
        crcs = [0] * len(images)
        for number, segment in enumerate(self.codec.segments):
            latent, tables = latents[segment.name], self.frozen.tables[segment.name]
            write = functools.partial(range_coder.encode, tables=tables)

            def coded(mask, rows, means, latent=latent, write=write):
                with phases.within("host"):
                    symbols = np.rint(latent[:, mask] - means).astype(np.int32)
                with phases.within("coder"):
                    for n, string in enumerate(pool.map(write, symbols, rows)):
                        strings[n].append(string)
                        crcs[n] = zlib.crc32(symbols[n].astype("<i4").tobytes(), crcs[n])
                return symbols

            found = self.in_passes(number, latent.shape, decoded, coded, phases)
            decoded[segment.name] = found
        with phases.within("coder"):
            steps = round(QUALITY * container.QUALITY_STEPS)
            header = container.Header(self.frozen.fingerprint, self.shape, False, steps)
            pairs = zip(strings, crcs, strict=True)
            return [container.pack(header, [pair]) for pair in pairs], decoded

    def decode(self, files: list[bytes], pool, phases: Phases) -> tuple[np.ndarray, dict]:
        """(uint8 images, the latents of the files)."""
        with phases.within("coder"):
            strings = [iter(container.unpack(data).layers[0].strings) for data in files]
        decoded = {"quality": self.quality}
        for number, segment in enumerate(self.codec.segments):
            read = functools.partial(range_coder.decode, tables=self.frozen.tables[segment.name])

            def coded(_, rows, means, read=read):
                del means
                with phases.within("coder"):
                    return np.stack(list(pool.map(read, map(next, strings), rows)))

            shape = (len(files), *segment.shape(*self.shape))
            decoded[segment.name] = self.in_passes(number, shape, decoded, coded, phases)
        with phases.within("transfer"):
            given = jax.block_until_ready(jax.device_put(decoded))
        with phases.within("network"):
            image = jax.block_until_ready(self.synthesise(self.variables, given))
        with phases.within("transfer"):
            return jax.device_get(image), decoded


def coding_cases(batch: int, shape: tuple[int, int], folder: pathlib.Path | None) -> list[Case]:
    """To bytes and back for a batch; for a single image also as the package does it."""
    frozen = load()
    images = pictures(folder, batch, shape)
    programs = Programs(frozen, images)
    pool = ThreadPoolExecutor(min(batch, os.cpu_count() or 1))
    files, written = programs.encode(images, pool, Phases())
    same = programs.same_on_cpu(written)
    cases = []

    def encode(phases):
        found, _ = programs.encode(images, pool, phases)
        return np.array([8 * len(data) / (shape[0] * shape[1]) for data in found])

    def decode(phases):
        found, read = programs.decode(files, pool, phases)
        if not all(np.array_equal(read[name], written[name]) for name in written):
            raise RuntimeError("a file did not decode to the latents that it was written of")
        return found.astype(np.float32)

    def compress(_):
        return np.array([8 * len(frozen.compress(images[0], QUALITY)) / (shape[0] * shape[1])])

    def decompress(_):
        return frozen.decompress(files[0]).astype(np.float32)

    paths = {"to bytes": encode, "from bytes": decode}
    if batch == 1:
        for compiling in (compress, decompress):
            compiling(None)
        paths |= {"FrozenCodec.compress": compress, "FrozenCodec.decompress": decompress}
    for name, path in paths.items():
        phases = Phases()
        about = {"rows_as_on_cpu": same} if path is encode else {}
        cases.append(
            Case(
                f"coding, {name}, {batch}",
                count(frozen.variables),
                batch,
                lambda path=path, phases=phases: path(phases),
                phases=phases,
                about=about,
            )
        )
    return cases
