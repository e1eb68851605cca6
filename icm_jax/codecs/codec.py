"""A codec is a list of segments, walked three ways: noise, rounding, range coder.

A segment is one latent. Its prior depends on the segments before it, and, if it is coded in several
passes, on its own elements of the passes before:

    prior(variables, decoded, shape) -> Prior(bits, index, mean)

`forward`, here, adds noise (training) or rounds (test). The walk with the range coder is that of
`icm_jax.codecs.bitstream`.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.codecs import tiles
from icm_jax.coding.tables import Tables
from icm_jax.errors import IcmError
from icm_jax.nets import context
from icm_jax.nets.integer import Reach

LARGEST, LONGEST = 1 << 14, 1 << 9
"""Number, and tuple, among the arguments of a codec."""
DTYPES = ("float32", "bfloat16", "float16")
_BUILT = 256  # codecs of a builder that are kept, with their compiled programs


class Prior(NamedTuple):
    """What a segment's prior says of a latent of known shape.

    Attributes:
      bits: latent float [N, h, w, C] -> bits of each element, float32 of the same shape.
      index: int32 [N, h, w, C], the table row of each element.
      mean: float32 [N, h, w, C] or None: the latent is coded as its rounded distance from it.
    """

    bits: Callable[[jax.Array], jax.Array]
    index: jax.Array | np.ndarray
    mean: jax.Array | None = None


PriorOf = Callable[[Any, Mapping[str, jax.Array], tuple[int, ...]], Prior]
"""(variables, decoded, shape [N, h, w, C]) -> Prior."""


class Causal(NamedTuple):
    """A prior that sees, at each position, what is decoded around it: `icm_jax.nets.context`.

    It is a `PriorOf` of the whole latent, which `decoded` then has to hold.

    Attributes:
      name: of its segment.
      once: (variables, decoded, shape [N, h, w, C]) -> [N, h, w, K], what it knows without.
      each: (variables, what `once` gives, what is seen) at any positions, [N, P, Q, K] and
        [N, P, Q, 12 C] -> Prior of them.
    """

    name: str
    once: Callable[[Any, Mapping[str, jax.Array], tuple[int, ...]], jax.Array]
    each: Callable[[Any, jax.Array, jax.Array], Prior]

    def __call__(self, variables, decoded, shape) -> Prior:
        seen = context.around(decoded[self.name], jnp)
        return self.each(variables, self.once(variables, decoded, shape), seen)


class Segment(NamedTuple):
    """One latent; `icm_jax.codecs.priors` makes the usual ones.

    Attributes:
      name: its key in the dictionaries of latents; not "quality", "known" nor "bounds".
      shape: (height, width) of the image -> (h, w, C) of the latent.
      prior: in floats, for training and for `freeze`; if it is `Causal`, the latent is coded wave
        by wave, in one string.
      freeze: (host variables, sample latents {segment: [N, h, w, C]}) -> (Tables, arrays for
        `variables["integer"][name]` or None).
      exact: the prior that a frozen codec has: index and mean come from integers alone, out of
        `variables["integer"][name]`. None: `prior` does it already.
      layer: which layer of the file holds it, from 0 on.
      spent: path below "params" of a network that `exact` does without, or ().
      passes: (h, w, C) -> int [h, w, C], the pass from 0 on in which each element is coded, or
        None for a single one. Within the segment's prior `decoded` then has two entries more: its
        own name, [N, h, w, C] with the elements of earlier passes and 0 elsewhere, and "known",
        float32 [N, h, w, C] with 1 at these elements.
      rows: of its tables, or None for what only `freeze` knows.
      integers: (shapes of the arrays in `variables["integer"][name]`, channels of each latent) ->
        {(array of arrays, array): (shape, dtype)}, what `exact` needs of them; None: not checked.
      thaw: (arrays that `freeze` gave, {segment: channels}) -> the parameters below `spent` in
        floats, about as they were; None: the codec file has them as they are.
      reach: what the exact prior looks at, so that it can be had in windows; of none, if that is
        the same everywhere. `decoded` then has "bounds", as `integer.run` takes them. None: the
        prior is computed of whole latents, by a program for each size.
      real: of a frozen codec, the prior in floats.
      asks: whether the prior looks at "quality" in `decoded`.
    """

    name: str
    shape: Callable[[int, int], tuple[int, int, int]]
    prior: PriorOf
    freeze: Callable[[Any, Mapping[str, np.ndarray]], tuple[Tables, Any]]
    exact: PriorOf | None = None
    layer: int = 0
    spent: tuple[str, ...] = ()
    passes: Callable[[tuple[int, ...]], np.ndarray] | None = None
    reach: Reach | None = None
    rows: int | None = None
    integers: Callable[..., dict[tuple[str, str], tuple[tuple[int, ...], str]]] | None = None
    thaw: Callable[[Mapping[str, Any], Mapping[str, int]], Mapping[str, Any]] | None = None
    real: PriorOf | None = None
    asks: bool = False


class Codec(NamedTuple):
    """A codec: what an image becomes, in which order it is written, what can be read back.

    Attributes:
      parts: top-level names of the parameters that the codec needs.
      init: (key, image uint8 [N, H, W, 3]) -> variables.
      analyse: (variables, inputs) -> {segment: latent}; inputs hold "image" uint8 [N, H, W, 3] or,
        for codecs of features, "feature"; and "quality" where the codec has qualities.
      segments: in the order of the stream, layer by layer.
      outputs: name -> (variables, decoded, (height, width)) -> array; `decoded` has "quality", too.
      qualities: the rate is chosen at encoding: "quality" float32 [N], 0 to 1, is an input.
      tiling: how to code images in windows, or None.
      config: (name in CODECS, its arguments as items), set by `builder`: what a saved codec stores.
    """

    parts: tuple[str, ...]
    init: Callable
    analyse: Callable
    segments: tuple[Segment, ...]
    outputs: Mapping[str, Callable]
    qualities: bool = False
    tiling: tiles.Tiling | None = None
    config: tuple = ()


class Outputs(dict):
    """A dict that a codec, which is a static argument of compiled functions, may hold."""

    def __init__(self, **outputs):
        super().__init__(outputs)

    def __hash__(self):
        return id(self)


def builder(name: str) -> Callable[[Callable[..., Codec]], Callable[..., Codec]]:
    """Decorator of a function that builds codecs, by its name in `CODECS`.

    Its arguments, defaults included, become `Codec.config`, lists as tuples; called twice with
    equal arguments it returns the same Codec. The result raises IcmError for other arguments than
    the function has, or of other types than it says, or with numbers that no codec has.
    """

    def decorated(function):
        signature = inspect.signature(function)

        @functools.lru_cache(_BUILT)
        def built(items):
            return function(**dict(items))._replace(config=(name, items))

        @functools.wraps(function)
        def build(*values, **fields) -> Codec:
            try:
                given = signature.bind(*values, **fields)
            except TypeError as error:
                raise IcmError(f"the codec {name!r} is built by {name}{signature}: {error}") from (
                    error
                )
            given.apply_defaults()
            items = tuple((key, tupled(value)) for key, value in given.arguments.items())
            hints = typing.get_type_hints(function)
            for key, value in items:
                if not _fits(value, hints.get(key)) or not _sane(value):
                    hint = signature.parameters[key].annotation
                    kind = getattr(hint, "__name__", hint)
                    raise IcmError(
                        f"the codec {name!r} takes {key}: {kind}, of numbers from 0 to {LARGEST}, "
                        f"not {repr(value)[:80]}"
                    )
            return built(items)

        return build

    return decorated


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type: numbers, text, tuples; others see for themselves."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if inner[-1] is Ellipsis:
            inner = inner[:1] * len(value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    return hint not in (int, bool, str, float) or type(value) in (hint, *[int] * (hint is float))


def _sane(value: Any) -> bool:
    """Whether no number in it is so large, nor a list so long, that it is no codec's."""
    if isinstance(value, tuple):
        return len(value) <= LONGEST and all(map(_sane, value))
    return not isinstance(value, int | float) or 0 <= value <= LARGEST


def tupled(value):
    """`value` with tuples in place of lists, as JSON does not know them."""
    return tuple(tupled(item) for item in value) if isinstance(value, list) else value


def as_float16(leaf: np.ndarray) -> np.ndarray:
    """Rounded to half precision, in its own dtype."""
    limit = np.finfo(np.float16).max
    return leaf.clip(-limit, limit).astype(np.float16).astype(leaf.dtype)


def require_dtype(dtype: str) -> None:
    """Raises: IcmError for a type in which no transform is computed."""
    if dtype not in DTYPES:
        raise IcmError(f"transforms are computed in {', '.join(DTYPES)}, not {dtype[:40]!r}")


def method_of(module, part: str, collections: tuple[str, ...] = ("params",)) -> Callable:
    """(variables, *arguments, method=name) -> what that method of a Flax module gives, or the
    module of that name within it, with its variables under `part` in each of `collections`."""

    def run(variables, *arguments, method):
        of_module = {name: variables[name][part] for name in collections}
        named = lambda instance, *given: getattr(instance, method)(*given)  # noqa: E731
        return module.apply(of_module, *arguments, method=named)

    return run


def frozen_priors(codec: Codec) -> Codec:
    """The codec with the priors that coding takes: those of integers, where they differ."""
    segments = tuple(
        segment._replace(
            prior=segment.exact or segment.prior,
            exact=None,
            real=segment.real or segment.prior,
        )
        for segment in codec.segments
    )
    return codec._replace(segments=segments)


def pass_masks(segment: Segment, shape: tuple[int, ...]) -> list[np.ndarray]:
    """bool [h, w, C] for each pass of a segment of `shape` [N, h, w, C]: what is coded in it.

    Raises: IcmError if the passes are not numbers from 0 on, one for each element.
    """
    if segment.passes is None:
        return [np.ones(shape[1:], bool)]
    number = np.asarray(segment.passes(shape[1:]))
    if number.shape != shape[1:] or number.dtype.kind not in "iu" or number.min() < 0:
        raise IcmError(
            f"the passes of latent {segment.name!r} are {number.dtype} {number.shape}; give a "
            f"whole number from 0 on for each element of {shape[1:]}"
        )
    return [number == turn for turn in range(number.max() + 1)]


def seen(segment: Segment, decoded, values, known) -> dict:
    """`decoded` as a segment's own prior sees it: with what earlier passes gave, if it has any.

    Args: values: float32 [N, h, w, C], 0 where nothing is decoded yet. known: bool [h, w, C].
    """
    if segment.passes is None:
        return dict(decoded)
    of_all = np.broadcast_to(known[None].astype(np.float32), values.shape)
    return dict(decoded) | {segment.name: values, "known": of_all}


class Forward(NamedTuple):
    """Result of `forward`.

    Attributes:
      outputs: by name. latents: by segment, noisy or rounded, float [N, h, w, C].
      bits: of an image, by segment, float32 [N]. maps: where they lie, float32 [N, h, w].
    """

    outputs: dict[str, jax.Array]
    bits: dict[str, jax.Array]
    latents: dict[str, jax.Array]
    maps: dict[str, jax.Array]


def forward(
    codec: Codec,
    variables,
    inputs: Mapping[str, jax.Array],
    shape: tuple[int, ...],
    *,
    straight_through: bool = False,
    key: jax.Array | None = None,
    temperature: jax.Array | None = None,
) -> Forward:
    """Codes without bytes: with noise if there is a key, else exactly what decoding gives.

    Args:
      inputs: what `codec.analyse` takes.
      shape: (height, width) of the images in pixels.
      straight_through: with a key, let the outputs see rounded latents, the priors noisy ones.
      temperature: with a key, latents are rounded by chance in place of noise, see `ops.quantise`.
    """
    latents = codec.analyse(variables, inputs)
    decoded = {"quality": inputs["quality"]} if codec.qualities else {}
    maps: dict[str, jax.Array] = {}
    for number, segment in enumerate(codec.segments):
        of_segment = None if key is None else jax.random.fold_in(key, number)
        if isinstance(segment.prior, Causal) and key is None:
            values, bits = _in_waves(segment.prior, variables, latents[segment.name], decoded)
        else:
            values, bits = _quantised(
                segment,
                variables,
                latents[segment.name],
                decoded,
                functools.partial(ops.quantise, key=of_segment, temperature=temperature),
                straight_through and key is not None,
            )
        decoded[segment.name], maps[segment.name] = values, bits.sum(axis=3)
    outputs = {name: output(variables, decoded, shape) for name, output in codec.outputs.items()}
    bits = {name: values.sum(axis=(1, 2)) for name, values in maps.items()}
    latents = {segment.name: decoded[segment.name] for segment in codec.segments}
    return Forward(outputs, bits, latents, maps)


def _in_waves(prior: Causal, variables, latent, decoded):
    """(what decoding gives of a latent, the bits of each element), wave by wave."""
    once = prior.once(variables, decoded, latent.shape)

    def decided(latent, once, seen):
        return ops.quantise(latent, prior.each(variables, once, seen).mean)

    values = context.in_waves(latent, once, decided)
    return values, prior.each(variables, once, context.around(values, jnp)).bits(values)


def _quantised(segment: Segment, variables, latent, decoded, quantise, rounds: bool):
    """(what decoding gives of a latent, the bits of each element), pass by pass."""
    masks = pass_masks(segment, latent.shape)
    values, total = jnp.zeros_like(latent), jnp.zeros(latent.shape, jnp.float32)
    known = np.zeros(latent.shape[1:], bool)
    if isinstance(segment.prior, Causal):  # in training: all positions see noise around them
        decoded = {**decoded, segment.name: quantise(latent)}
    for mask in masks:
        prior = segment.prior(variables, seen(segment, decoded, values, known), latent.shape)
        noisy = quantise(latent, prior.mean)
        bits = prior.bits(noisy)
        given = ops.quantise(latent, prior.mean) if rounds else noisy
        if len(masks) == 1:
            return given, bits
        values = jnp.where(mask[None], given, values)
        total = jnp.where(mask[None], bits, total)
        known = known | mask
    return values, total
