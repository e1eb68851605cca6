"""Files as an attacker writes them: any content, with the checksums and fingerprints that belong
to it. Archives and headers are written from docs/icm_format.md, not by the package's own writers;
for seals, what strings decode to is asked of the codec."""

import binascii
import functools
import hashlib
import io
import json
import warnings
import zlib

import numpy as np

from icm_jax.codecs import bitstream, walk
from icm_jax.coding import container, range_coder
from icm_jax.errors import IcmError


def opened(data: bytes) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, model.json) of an .icmc file."""
    with np.load(io.BytesIO(data)) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(arrays.pop("model.json").tobytes())


def fingerprint(arrays: dict[str, np.ndarray], codec, segments) -> bytes:
    """Of a model with these arrays: configuration, weights by name, tables by segment."""
    digest = hashlib.sha256(json.dumps(codec).encode())
    for name in sorted(name for name in arrays if name.startswith("variables/")):
        array = arrays[name].astype(np.float32) if arrays[name].dtype == "f2" else arrays[name]
        digest.update(name.removeprefix("variables/").encode() + str(array.dtype).encode())
        digest.update(array.tobytes())
    for name in segments:
        cdf, offsets = (arrays.get(f"tables/{name}/{key}") for key in ("cdf", "offsets"))
        if cdf is not None and offsets is not None:
            with warnings.catch_warnings(action="ignore"):  # of complex numbers, say
                parts = [table.astype("<i4").tobytes() for table in (cdf, offsets)]
            digest.update(
                hashlib.sha256(len(parts[0]).to_bytes(8, "little") + b"".join(parts)).digest()
            )
    return digest.digest()[:4]


def model(arrays: dict[str, np.ndarray], facts: dict, segments=(), *, deflated=True) -> bytes:
    """An .icmc file with its fingerprint."""
    facts = dict(facts, fingerprint=fingerprint(arrays, facts.get("codec"), segments).hex())
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    file, write = io.BytesIO(), np.savez_compressed if deflated else np.savez
    write(file, **dict(arrays, **{"model.json": text}))  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def varint(value: int) -> bytes:
    """LEB128."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def head(model, sides, quality, layers, flags: int | None = None) -> bytes:
    """The header of an .icm file with its CRC; `layers` of strings."""
    if flags is None:
        flags = len(layers) | (quality is not None) << 5
    out = b"ICM\x02" + model + bytes([flags]) + b"".join(map(varint, sides))
    out += b"" if quality is None else varint(quality)
    for number, strings in enumerate(layers):
        out += bytes([len(strings)])
        out += b"".join(
            varint(len(s)) for s in strings[: len(strings) - (number == len(layers) - 1)]
        )
    return out + binascii.crc_hqx(out, 0).to_bytes(2, "big")


def stream(header: bytes, layers, symbols) -> bytes:
    """An .icm file: `symbols`, int32 of each layer, are what its seal is over."""
    out = header
    for strings, integers in zip(layers, symbols, strict=True):
        body = b"".join(strings)
        seal = zlib.crc32(body, zlib.crc32(header[:-2], zlib.crc32(integers.tobytes())))
        out += binascii.crc_hqx(body, 0).to_bytes(2, "big") + seal.to_bytes(4, "little") + body
    return out


# Streams: the subject is a frozen codec and what it wrote of a few pictures.

SIDES = (1, 7, 16, 33, 40, 64, 65, 100)
CLAIMS = (0, 2**14, 2**14 + 1, 2**16, 2**21 - 1, 2**21, 2**28, 2**35 - 1)
NUMBERS = (0, 1, -1, 2, 127, 128, 255, 2**15, -(2**15), 2**29, 2**30, 2**31 - 1, -(2**31))


def altered(rng, data: bytes) -> bytes:
    """Bytes with a few bits, or a piece, changed."""
    out, at = bytearray(data), int(rng.integers(len(data) + 1))
    size = int(rng.geometric(0.2))
    match rng.integers(6):
        case 0 if out:
            for place in rng.integers(8 * len(out), size=size):
                out[place // 8] ^= 1 << place % 8
        case 1:
            del out[at:]
        case 2:
            out[at : at + size] = bytes([int(rng.choice((0, 255)))]) * size
        case 3:
            out[at:at] = rng.bytes(size)
        case 4:
            del out[at : at + size]
        case _:
            return rng.bytes(size * 8)
    return bytes(out)


def forged_stream(rng, frozen, whole) -> bytes:
    """One .icm file out of a whole one, an `icm_jax.coding.container.Stream`, for a codec."""
    sides, quality = list(whole.header.shape), whole.header.quality
    layers = [list(layer.strings) for layer in whole.layers]
    flags = None
    match rng.integers(8):
        case 0:
            sides = [int(rng.choice(SIDES)) for _ in sides]
        case 1:
            sides[rng.integers(2)] = int(rng.choice(CLAIMS))
        case 2:
            quality = None if quality is not None and rng.integers(2) else int(rng.integers(10_200))
        case 3:
            flags = int(rng.integers(256))
        case 4:
            layers = layers + layers if rng.integers(2) else [strings[::-1] for strings in layers]
        case 5:
            layers[0].append(rng.bytes(int(rng.integers(3))))
        case _:
            for strings in layers:
                at = int(rng.integers(len(strings)))
                strings[at] = altered(rng, strings[at])
    known = frozen.fingerprint if rng.integers(20) else rng.bytes(4)
    header = head(known, sides, quality, layers, flags)
    symbols = [np.zeros(0, "<i4")] * len(layers)
    data = stream(header, layers, symbols)
    return sealed(frozen, data)


class _Anything:
    """Is equal to every seal."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __ne__(self, other):
        return False


def sealed(frozen, data: bytes) -> bytes:
    """The file with the seals of what its strings decode to; as it is, where they do not."""
    found = []

    def noted(head_, strings, crc):
        found.append(real(head_, strings, crc))
        return _Anything()

    real = container.seal
    container.seal = noted
    try:
        bitstream.decode_latents(frozen, data)
    except IcmError:
        return data
    finally:
        container.seal = real
    whole = container.unpack(data)
    at = len(whole.head) + 2
    out = bytearray(data)
    for layer, seal in zip(whole.layers, found, strict=True):
        out[at + 2 : at + 6] = seal.to_bytes(4, "little")
        at += 6 + sum(map(len, layer.strings))
    return bytes(out)


def forged_symbols(rng, frozen, sides, quality) -> bytes:
    """A file of any symbols at all, written with the codec's own tables and range coder."""
    codec, layers = frozen.codec, []
    decoded = {} if quality is None else {"quality": np.full(1, quality / 1e4, np.float32)}
    symbols_of: list[list[np.ndarray]] = []
    for number, segment in enumerate(codec.segments):
        if segment.layer == len(layers):
            layers.append([])
            symbols_of.append([])
        spread = int(rng.choice((0, 1, 30, 2**20)))

        def coded(chosen, rows, mean, name=segment.name, spread=spread):
            symbols = rng.integers(-spread, spread + 1, len(rows)).astype(np.int32)
            if len(symbols):
                far = int(rng.choice(NUMBERS))
                symbols[rng.integers(len(symbols))] = min(max(far, -(2**29)), 2**29)
            layers[-1].append(range_coder.encode(symbols, rows, frozen.tables[name]))
            symbols_of[-1].append(symbols)
            return symbols

        shape = (1, *segment.shape(*sides))
        decoded[segment.name] = walk.in_passes(
            codec, number, frozen.on_device, shape, decoded, coded
        )
    header = head(frozen.fingerprint, sides, quality, layers)
    return stream(header, layers, [np.concatenate(s).astype("<i4") for s in symbols_of])


# Models.

VALUES = (
    *(None, True, 0, -1, 1, 3, 17, 256, 2**14, 2**14 + 1, 2**31, 2**63, 10**30, 0.5, -1.0, 1e308),
    *("", "float64", "factorised", "scale_hyperprior", "x" * 5000, [], [1] * 4, [2**14] * 4),
    *([1] * 600, [[[]]], {}, [-1, -1, -1, -1], [1e9], ["a"]),
)
"""For a field of a configuration."""
NAMES = (
    "image",
    "space_channel",
    "autoencoder",
    "scalable",
    "layered",
    "omni_filter",
    "omni_feature",
    "",
    7,
)


_opened = functools.lru_cache(8)(opened)


def forged_model(rng, data: bytes, segments) -> bytes:
    """One .icmc file out of a whole one."""
    arrays, facts = _opened(data)
    arrays, facts = dict(arrays), json.loads(json.dumps(facts))
    for _ in range(int(rng.geometric(0.7))):
        match rng.integers(10):
            case 0 | 1:
                _alter_config(rng, facts)
            case 2 | 3 | 4:
                _reshape(rng, arrays)
            case 5 | 6 | 7:
                _revalue(rng, arrays)
            case 8:
                _alter_tables(rng, arrays, segments)
            case _:
                key = rng.choice(["version", "licence", "description", "detector", "codec", "more"])
                facts[str(key)] = VALUES[rng.integers(len(VALUES))]
    try:
        out = model(arrays, facts, segments, deflated=rng.integers(8) == 0)
    except (TypeError, ValueError, KeyError, AttributeError):  # nothing that could be written
        return altered(rng, data)
    return altered(rng, out) if not rng.integers(50) else out


def _alter_config(rng, facts) -> None:
    if (
        not isinstance(facts.get("codec"), list)
        or len(facts["codec"]) != 2
        or not facts["codec"][1]
    ):
        return
    items = facts["codec"][1]
    at = int(rng.integers(len(items)))
    match rng.integers(8):
        case 0:
            del items[at]
        case 1:
            items.append(
                [str(rng.choice(["more", items[at][0]])), VALUES[rng.integers(len(VALUES))]]
            )
        case 2:
            facts["codec"][0] = NAMES[rng.integers(len(NAMES))]
        case 3 if isinstance(items[at][1], list) and items[at][1]:
            inner = items[at][1]
            inner[rng.integers(len(inner))] = VALUES[rng.integers(len(VALUES))]
        case 4 | 5 if isinstance(items[at][1], int):
            items[at][1] += int(rng.choice((-1, 1, 64)))
        case _:
            items[at][1] = VALUES[rng.integers(len(VALUES))]


def _any(rng, arrays) -> str:
    return list(arrays)[rng.integers(len(arrays))]


def _reshape(rng, arrays) -> None:
    """Of one array the shape, the type or the name."""
    name = _any(rng, arrays)
    array = arrays[name]
    match rng.integers(10):
        case 0:
            arrays[name] = array.reshape(-1)
        case 1:
            arrays[name] = array[None]
        case 2:
            arrays[name] = array.T
        case 3:
            arrays[name] = array[:-1]
        case 4:
            arrays[name] = np.concatenate([array, array])
        case 5:
            kind = rng.choice(["f2", "f4", "f8", ">f4", "i1", "i4", "i8", "u1", "c8", "U3", "?"])
            with np.errstate(all="ignore"):
                arrays[name] = array.astype(str(kind))
        case 6:
            arrays[name + str(rng.choice(["/more", "x"]))] = arrays.pop(name)
        case 7:
            del arrays[name]
        case 8:
            arrays[name] = np.zeros((0, *array.shape[1:]), array.dtype)
        case _:
            arrays[name] = np.zeros((int(rng.choice((1, 2**10, 2**22))), 4), array.dtype)


def _revalue(rng, arrays) -> None:
    """Of one array some numbers, or all."""
    name = _any(rng, arrays)
    array = arrays[name].copy().reshape(-1)
    if not array.size or array.dtype.kind not in "fi":
        return
    places = rng.integers(array.size, size=int(rng.choice((1, 3, array.size))))
    if array.dtype.kind == "f":
        with np.errstate(all="ignore"):
            array[places] = rng.choice((np.nan, np.inf, -np.inf, 0.0, 1e30, -6e4, 1e-40))
    else:
        about = np.iinfo(array.dtype)
        array[places] = np.clip(rng.choice(NUMBERS, len(places)), about.min, about.max)
    arrays[name] = array.reshape(arrays[name].shape)


def _alter_tables(rng, arrays, segments) -> None:
    """Tables that are tables, of other probabilities; and offsets of any kind."""
    name = f"tables/{segments[rng.integers(len(segments))]}/"
    if name + "cdf" not in arrays or name + "offsets" not in arrays:
        return
    rows, precision = len(arrays[name + "offsets"]), int(rng.integers(1, 17))
    sign = int(rng.choice((-1, 1)))
    row = [sign * precision, 0, *(1 << np.arange(precision + 1))][: int(rng.integers(2, 20))]
    row = [*row[:-1], 1 << precision] if rng.integers(4) else row
    if rng.integers(2):
        arrays[name + "cdf"] = np.array(row * rows, np.int32)
    else:
        arrays[name + "offsets"] = rng.choice(NUMBERS, rows).astype(np.int32)
