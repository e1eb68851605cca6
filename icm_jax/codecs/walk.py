"""A codec's parts as compiled programs, and the walk through a latent's passes on the host.

Encoder and decoder both take `in_passes`, and so see the same numbers at the same places.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.codecs import causal, programs, tiles
from icm_jax.codecs.codec import Causal, Codec, Segment, forward, pass_masks, seen
from icm_jax.codecs.tiles import Part

TOGETHER = 8
"""Windows of one image in a batch on accelerators, which are idle with one."""
SAMPLED_AT_ONCE = 8
"""Images that `sample` computes in one batch."""
_ELEMENT = 16
"""Pixels that an element of a latent counts for where windows of priors are chosen."""


def in_passes(
    codec: Codec,
    number: int,
    variables,
    shape: tuple[int, ...],
    decoded: Mapping[str, np.ndarray],
    symbols_of: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    sizes: Sequence[tiles.Size] = tiles.SIZES,
) -> np.ndarray:
    """A latent as decoding gives it, float32 of `shape`: what encoder and decoder both walk.

    Args:
      codec: with exact priors. number: of the segment. variables: on the device.
      decoded: the latents before, and "quality".
      symbols_of: (places of a pass, or wave, in the latent: what indexes it; their table rows int32
        [n], their means float32 [n]) -> the integers int32 [n], in the order row, column, channel.
      sizes: of windows, see `tiles`.
    """
    segment = codec.segments[number]
    if isinstance(segment.prior, Causal):
        once, _ = prior(codec, number, shape, variables, decoded, sizes)
        own = _integers(variables, segment)
        return causal.walked(codec, number, own, shape, once, symbols_of)
    values = np.zeros(shape, np.float32)
    known = np.zeros(shape[1:], bool)
    for mask in pass_masks(segment, shape):
        given = seen(segment, decoded, values, known)
        index, mean = prior(codec, number, shape, variables, given, sizes)
        chosen = mask[None]
        mean = np.broadcast_to(np.float32(0) if mean is None else mean, shape)[chosen]
        # Encoder and decoder add the same two numbers, so that both go on from the same latents.
        symbols = symbols_of(chosen, index[chosen], mean)
        values[chosen] = symbols.astype(np.float32) + mean
        known |= mask
    return values


def together(variables) -> int:
    """How many windows of an image are computed at a time where `variables` are."""
    device = jax.tree.leaves(variables)[0].device
    return 1 if device.platform == "cpu" else TOGETHER


def strings_of(segment: Segment, shape: tuple[int, ...]) -> int:
    """How many strings a segment of `shape` [N, h, w, C] takes in its layer: one per pass."""
    return 1 if segment.passes is None else len(pass_masks(segment, shape))


def analyse(
    codec: Codec,
    variables,
    image: np.ndarray,
    condition: Mapping[str, np.ndarray],
    sizes: Sequence[tiles.Size] = tiles.SIZES,
) -> dict[str, np.ndarray]:
    """The latents of an image, uint8 [1, H, W, 3], on the host.

    Args:
      condition: "quality", where the codec has qualities.
      sizes: of windows, see `tiles`; of none, the whole image in one program.
    """
    tiling = codec.tiling
    if tiling is None or not sizes:
        inputs = {"image": image, **condition}
        return jax.device_get(programs.run(_analyse, (codec,), variables, inputs))
    image = ops.pad_to(image, tiling.grid)
    sides, weights = image.shape[1:3], _floats(variables)

    def front(part: Part):
        return programs.run(_front, (codec,), weights, (part, condition))

    y = tiles.in_windows(
        front,
        {"image": (image, 1)},
        sides,
        tiling.factor,
        tiling.halo,
        sizes,
        together(variables),
    )
    latents = slices(codec, tiling.segments, y)
    return latents | rest_of(codec, variables, y, condition, sizes)


def rest_of(codec: Codec, variables, y, condition: Mapping, sizes=tiles.SIZES) -> dict[str, Any]:
    """The latents that `analyse` makes of y [1, h, w, C], of a codec with a tiling."""
    tiling = codec.tiling
    assert tiling
    if tiling.rest == 1:
        return {}
    weights = _floats(variables)

    def rest(part: Part):
        return programs.run(_rest, (codec,), weights, (part, condition))

    sides = tiling.factor * y.shape[1], tiling.factor * y.shape[2]
    step, halo = tiling.factor * tiling.rest, tiling.factor * tiling.rest_halo
    given = {"latent": (y, tiling.factor)}
    squares = tiles.squares(sizes)
    return tiles.in_windows(rest, given, sides, step, halo, squares, together(variables))


def _floats(variables) -> dict:
    """What transforms are computed with, of the variables of a frozen codec."""
    return {name: tree for name, tree in variables.items() if name != "integer"}


def _integers(variables, segment: Segment):
    """What a segment's exact prior is computed with, see `Segment`."""
    own = variables.get("integer", {}).get(segment.name)
    return variables if own is None else {"integer": {segment.name: own}}


def _condition(segment: Segment, decoded: Mapping) -> dict[str, np.ndarray]:
    """The quality, for a prior that asks for it: other programs serve every codec's."""
    return {"quality": decoded["quality"]} if segment.asks and "quality" in decoded else {}


def slices(codec: Codec, names: Sequence[str], y) -> dict[str, Any]:
    """Latents that stand side by side, by name."""
    channels = {segment.name: segment.shape(1, 1)[2] for segment in codec.segments}
    found, end = {}, 0
    for name in names:
        begin, end = end, end + channels[name]
        found[name] = y[..., begin:end]
    return found


def output(
    codec: Codec,
    name: str,
    shape: tuple[int, int],
    variables,
    decoded: Mapping[str, np.ndarray],
    sizes: Sequence[tiles.Size] = tiles.SIZES,
    *,
    pixels: bool = False,
) -> np.ndarray:
    """An output of the decoded latents of an image of `shape`, float32 [1, ...], on the host.

    Args:
      sizes: of windows, see `tiles`; of none, the whole image in one program.
      pixels: of an image, clipped and rounded to uint8 where it is computed: less to move.

    Raises: KeyError with the name of a latent that is needed and not there.
    """
    tiling = codec.tiling
    back = next((b for b in tiling.back if b.output == name), None) if tiling else None
    if tiling is None or back is None or not sizes:
        static = codec, name, shape, pixels
        return np.asarray(programs.run(_output, static, variables, dict(decoded)))
    y = np.concatenate([decoded[name] for name in back.segments], axis=-1)
    factor = tiling.factor
    condition = {name: value for name, value in decoded.items() if name == "quality"}
    weights = _floats(variables)

    def output_of(part: Part):
        return programs.run(_output_of_window, (codec, back, pixels), weights, (part, condition))

    sides = y.shape[1] * factor, y.shape[2] * factor
    given, halo = {"latent": (y, factor)}, factor * back.halo
    found = tiles.in_windows(output_of, given, sides, back.step, halo, sizes, together(variables))
    if back.step == 1:
        return found[:, : shape[0], : shape[1]]
    padded = (side + -side % tiling.grid for side in shape)
    height, width = (-(-side // back.step) for side in padded)
    return found[:, :height, :width]


def prior(
    codec: Codec,
    number: int,
    shape: tuple[int, ...],
    variables,
    decoded: Mapping[str, np.ndarray],
    sizes: Sequence[tiles.Size] = tiles.SIZES,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Table rows, int32 of `shape`, and means, float32 of `shape` or None; of a `Causal` prior
    what it knows `once`, and None."""
    segment = codec.segments[number]
    reach = segment.reach
    if reach is None:
        found = programs.run(_whole_prior, (codec, number, shape), variables, decoded)
        return jax.device_get(found)
    if not reach.factors:
        rows, mean = _whole_prior(codec, number, shape, variables, decoded)
        return np.asarray(rows), None if mean is None else np.asarray(mean)
    given = {name: (decoded[name], _ELEMENT * n) for name, n in reach.factors}
    weights, condition = _integers(variables, segment), _condition(segment, decoded)
    options = None if weights is variables else programs.quick

    def of_window(part: Part):
        inputs = part, condition
        return programs.run(_prior_of_window, (codec, number), weights, inputs, options=options)

    sides = _ELEMENT * shape[1], _ELEMENT * shape[2]
    halo, squares = _ELEMENT * reach.halo, tiles.squares(sizes or tiles.SIZES)
    return tiles.in_windows(of_window, given, sides, _ELEMENT, halo, squares, together(variables))


# What is compiled: the codec and what else is fixed, variables, inputs.


def _analyse(codec, variables, inputs):
    return codec.analyse(variables, inputs)


def _front(codec, variables, inputs):
    part, condition = inputs
    with tiles.within(part, "image"):
        return codec.tiling.front(variables, part.arrays | condition)


def _rest(codec, variables, inputs):
    part, condition = inputs
    with tiles.within(part, "latent"):
        latents = codec.analyse(variables, part.arrays | condition)
    return {name: latent for name, latent in latents.items() if name not in codec.tiling.segments}


def _output_of_window(codec, back, pixels, variables, inputs):
    part, condition = inputs
    y, factor = part.arrays["latent"], codec.tiling.factor
    shape = tuple(factor * side for side in y.shape[1:3])
    with tiles.within(part, "latent"):
        latents = slices(codec, back.segments, y)
        found = codec.outputs[back.output](variables, latents | condition, shape)
    return _pixels(found) if pixels else found


def _pixels(image):
    return jnp.round(jnp.clip(image, 0, 255)).astype(jnp.uint8)


def _whole_prior(codec, number, shape, variables, decoded):
    prior = codec.segments[number].prior(variables, decoded, shape)
    return prior.index, prior.mean


def _prior_of_window(codec, number, variables, inputs):
    (part, condition), segment = inputs, codec.segments[number]
    name, factor = segment.reach.factors[0]
    count, *sides = part.arrays[name].shape[:3]
    height, width = (factor * side for side in sides)
    channels = segment.shape(1, 1)[2]
    decoded = part.arrays | condition | {"bounds": part.bounds}
    shape = count, height, width, channels
    if isinstance(segment.prior, Causal):
        return segment.prior.once(variables, decoded, shape), None
    prior = segment.prior(variables, decoded, shape)
    return prior.index, prior.mean


def _output(codec, name, shape, pixels, variables, decoded):
    found = codec.outputs[name](variables, decoded, shape)
    return _pixels(found) if pixels else found


def sample(codec: Codec, variables, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Latents as they will be decoded, rounded around their means, where they have any: {segment:
    float32 [N, h, w, C]}. Few images are computed at once, as those of one call need the memory of
    all their layers."""
    parts = range(0, len(inputs["image"]), SAMPLED_AT_ONCE)
    rows = [{k: value[n : n + SAMPLED_AT_ONCE] for k, value in inputs.items()} for n in parts]
    found = [jax.device_get(_sample(codec, variables, row)) for row in rows]
    return jax.tree.map(lambda *images: np.concatenate(images), *found)


@functools.partial(jax.jit, static_argnums=0)
def _sample(codec, variables, inputs):
    return forward(codec, variables, inputs, inputs["image"].shape[1:3]).latents


def maps(
    codec: Codec,
    variables,
    inputs: Mapping[str, np.ndarray],
    sizes: Sequence[tiles.Size] = (),
) -> dict[str, np.ndarray]:
    """Bits of each latent where they lie, summed over channels: {segment: float32 [N, h, w]}.

    Images are computed one by one, as they are coded: one program, however many there are, or with
    `sizes` those of windows, see `tiles`, where the codec has them and each latent a single pass.
    """
    several = codec.tiling and sizes
    in_parts = several and all(s.reach and s.passes is None for s in codec.segments)

    def of_image(given):
        if in_parts:
            return _maps_in_windows(codec, variables, given, sizes)
        return jax.device_get(programs.run(_maps, (codec,), variables, given))

    count = len(inputs["image"])
    rows = [{name: value[n : n + 1] for name, value in inputs.items()} for n in range(count)]
    return jax.tree.map(lambda *images: np.concatenate(images), *map(of_image, rows))


def _maps_in_windows(codec: Codec, variables, inputs, sizes) -> dict[str, np.ndarray]:
    """`maps` of one image."""
    condition = {name: value for name, value in inputs.items() if name == "quality"}
    latents = analyse(codec, variables, inputs["image"], condition, sizes)
    decoded, found = dict(condition), {}
    for number, segment in enumerate(codec.segments):
        latent = latents[segment.name]

        def rounded(chosen, rows, mean, latent=latent):
            del rows
            return np.rint(latent[chosen].ravel() - mean).astype(np.int32)

        given = codec, number, variables, latent.shape, decoded, rounded, sizes
        decoded[segment.name] = in_passes(*given)
        assert segment.reach
        factors = {**dict(segment.reach.factors), segment.name: 1}
        given = {name: (decoded[name], _ELEMENT * factor) for name, factor in factors.items()}

        inputs = _condition(segment, decoded)

        def of_window(part: Part, number=number, inputs=inputs):
            return programs.run(_bits_of_window, (codec, number), variables, (part, inputs))

        sides, halo = [_ELEMENT * side for side in latent.shape[1:3]], segment.reach.halo
        maps = tiles.in_windows(
            of_window, given, (sides[0], sides[1]), _ELEMENT, _ELEMENT * halo, tiles.squares(sizes)
        )
        found[segment.name] = maps[..., 0]
    return found


def _bits_of_window(codec, number, variables, inputs):
    (part, condition), segment = inputs, codec.segments[number]
    latent = part.arrays[segment.name]
    decoded = part.arrays | condition | {"bounds": part.bounds}
    prior = segment.prior(variables, decoded, latent.shape)
    return prior.bits(latent).sum(axis=3, keepdims=True)


def _maps(codec, variables, inputs):
    return forward(codec, variables, inputs, inputs["image"].shape[1:3]).maps
