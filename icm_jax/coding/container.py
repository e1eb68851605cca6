"""The `.icm` stream of one image: a header, then layers of strings; see docs/icm_format.md.

    bytes   content
    3       b"ICM"
    1       format version, 2
    4       fingerprint of the model that wrote it (weights and tables)
    1       number of layers (bits 0-3), greyscale (bit 4), has a quality (bit 5); the rest 0
    1-3 ×2  height and width of the image in pixels (LEB128)
    0-2     quality in hundredths, 0 to 10000 (LEB128)
    ...     per layer: number of its strings (1 byte), then the length of each (LEB128); the last
            string of the last layer has no length and takes the rest of the file
    2       CRC-16/XMODEM of the header up to here, big-endian

and per layer

    2       CRC-16/XMODEM of its strings, big-endian: are these the bytes that were written?
    4       its seal, little-endian: CRC-32 of the integer latents (int32, little-endian), continued
            over the header and the strings: did they decode to what was encoded?
    ...     the strings

A prefix of the file that holds the header and a whole layer can be decoded up to that layer.
"""

import binascii
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from icm_jax.errors import IcmError

MAGIC = b"ICM"
VERSION = 2
QUALITY_STEPS = 100  # per unit of quality
_MAX_SIDE = 1 << 21
_SEALS = 2 + 4  # bytes before a layer's strings: CRC-16 and seal
_MAX_LAYERS = 15
_MAX_STRINGS = 64
_MAX_HEAD = 9 + 3 * 5 + _MAX_LAYERS * (1 + _MAX_STRINGS * 5) + 2


class Header(NamedTuple):
    """What is known before any latent is decoded.

    Attributes:
      fingerprint: 4 bytes that name the frozen model.
      shape: (height, width) of the image in pixels.
      grey: the image has one channel.
      quality: in hundredths, 0 to 10000, or None for a model of one rate.
    """

    fingerprint: bytes
    shape: tuple[int, int]
    grey: bool = False
    quality: int | None = None


class Layer(NamedTuple):
    """The strings of one layer, one per pass of a segment, and its seal (see `seal`)."""

    strings: tuple[bytes, ...]
    seal: int


class Stream(NamedTuple):
    """A parsed file: `head` the bytes of the header without their CRC, `layers` those asked for."""

    header: Header
    layers: tuple[Layer, ...]
    head: bytes


def pack(header: Header, layers: Sequence[tuple[Sequence[bytes], int]]) -> bytes:
    """The bytes of a stream.

    Args:
      layers: per layer its strings and the CRC-32 of its integer latents.

    Raises: IcmError if a field does not fit the format.
    """
    height, width = header.shape
    if len(header.fingerprint) != 4:
        raise IcmError(f"a fingerprint has 4 bytes, not {len(header.fingerprint)}")
    if not (1 <= height < _MAX_SIDE and 1 <= width < _MAX_SIDE):
        raise IcmError(f"image sides must be 1 to {_MAX_SIDE - 1} pixels, not {height}×{width}")
    if header.quality is not None and not 0 <= header.quality <= 100 * QUALITY_STEPS:
        raise IcmError(f"a quality is 0 to 100, not {header.quality / QUALITY_STEPS}")
    if not 1 <= len(layers) <= _MAX_LAYERS:
        raise IcmError(f"{len(layers)} layers; the format holds 1 to {_MAX_LAYERS}")
    if not all(1 <= len(strings) <= _MAX_STRINGS for strings, _ in layers):
        raise IcmError(f"a layer holds 1 to {_MAX_STRINGS} strings")
    flags = len(layers) | header.grey << 4 | (header.quality is not None) << 5
    head = [MAGIC, bytes([VERSION]), header.fingerprint, bytes([flags])]
    head += [_varint(height), _varint(width)]
    head += [] if header.quality is None else [_varint(header.quality)]
    for number, (strings, _) in enumerate(layers):
        implicit = number == len(layers) - 1
        head.append(bytes([len(strings)]))
        head += [_varint(len(string)) for string in strings[: len(strings) - implicit]]
    head = b"".join(head)
    parts = [head, _crc16(head)]
    for strings, latents_crc in layers:
        body = b"".join(strings)
        parts += [_crc16(body), seal(head, strings, latents_crc).to_bytes(4, "little"), body]
    return b"".join(parts)


def seal(head: bytes, strings: Sequence[bytes], latents_crc: int) -> int:
    """CRC-32 over a layer's latents, the header and the layer's strings."""
    if not 0 <= latents_crc < 1 << 32:
        raise IcmError(f"a CRC-32 has 32 bits; {latents_crc} does not fit")
    return zlib.crc32(b"".join(strings), zlib.crc32(head, latents_crc))


def unpack(data: bytes, layers: int | None = None) -> Stream:
    """The inverse of `pack`, of the first `layers` layers or of all.

    Raises: IcmError on anything that `pack` has not written; what follows the layers asked for is
      not looked at.

    >>> stream = unpack(pack(Header(b"abcd", (480, 640)), [([b"first", b"second"], 0)]))
    >>> stream.header.shape, stream.layers[0].strings
    ((480, 640), (b'first', b'second'))
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise IcmError(f"a stream is bytes, not {type(data).__name__}; read the file first")
    data = bytes(data)
    header, directory, at = _parse_head(data)
    wanted = _require_layers(directory, layers)
    return Stream(header, _read_layers(data, at + 2, directory, wanted), data[:at])


def unpack_whole_layers(data: bytes) -> tuple[Stream, int]:
    """(the stream with as many of its layers as are there, how many it was written with), of a file
    that may end after any of them.

    Raises: IcmError as `unpack`, also if it ends elsewhere.
    """
    _, directory, at = _parse_head(bytes(data))
    for layers, lengths in enumerate(directory[:-1], start=1):
        at += (2 if layers == 1 else 0) + _SEALS + sum(lengths)
        if at == len(data):
            return unpack(data, layers), len(directory)
    return unpack(data), len(directory)


def describe(data: bytes) -> dict:
    """What the header of an .icm file says, and the lengths of its strings by layer.

    Of a file that was cut off after one of its layers "of" says how many it had.

    Raises: IcmError as `unpack_whole_layers`.
    """
    stream, count = unpack_whole_layers(data)
    header, (height, width) = stream.header, stream.header.shape
    missing = {"of": count} if len(stream.layers) < count else {}
    return {
        "width": width,
        "height": height,
        "channels": 1 if header.grey else 3,
        "bpp": round(8 * len(data) / (height * width), 4),
        "quality": None if header.quality is None else header.quality / QUALITY_STEPS,
        "model": header.fingerprint.hex(),
        "version": VERSION,
        "layers": [[len(string) for string in layer.strings] for layer in stream.layers],
    } | missing


def facts(name: str, data: bytes) -> dict:
    """What the header of an .icm file says or, of a file NAME.icmc, its model.json.

    Raises: IcmError as `describe` and `archive.describe`.
    """
    if not name.endswith(".icmc"):
        return describe(data)
    from icm_jax.coding import archive  # needs NumPy

    return archive.describe(name)


def short(value, length: int = 500) -> str:
    """A fact as a person reads it: the table of a detector takes kilobytes."""
    text = str(value)
    return text if len(text) <= length else f"{text[:length]} ... (--json has all)"


def receive(file, layers: int, begun: bytes = b"") -> bytes:
    """The beginning of a stream with its first `layers` layers, read from a binary file.

    Of a pipe no more is waited for than these layers take: they can be decoded while the rest is
    still on its way. Only the length of the last layer of all is that of the whole file. `begun` is
    what was read of it before.

    Raises: IcmError as `unpack` for a header that is none; a layer that ends too early is left to
      `unpack`.
    """
    data = begun
    while True:
        more = file.read(1)
        data += more
        try:
            _, directory, at = _parse_head(data)
            break
        except IcmError:  # not whole yet, or never
            if not more or len(data) > _MAX_HEAD:
                raise
    wanted = _require_layers(directory, layers)
    if wanted == len(directory):
        return data + file.read()
    end = at + 2 + sum(_SEALS + sum(lengths) for lengths in directory[:wanted])
    return data + file.read(end - len(data))


def _parse_head(data: bytes) -> tuple[Header, list[list[int]], int]:
    """(header, lengths of each layer's strings, where the head's CRC begins).

    The length of the last string of all is not among them: it is what is left.
    """
    if data[:3] != MAGIC:
        raise IcmError(f"not an .icm file: it starts with {data[:3]!r}, not {MAGIC!r}")
    if len(data) > 3 and data[3] != VERSION:
        raise IcmError(f"format version {data[3]} is not known here; this release reads {VERSION}")
    flags, at = _byte(data, 8)
    count, grey, has_quality = flags & 15, bool(flags & 16), bool(flags & 32)
    (height, at), (width, at) = (pair := _read_varint(data, at)), _read_varint(data, pair[1])
    quality, at = _read_varint(data, at) if has_quality else (None, at)
    directory, sizes = [], []
    for number in range(count):
        strings, at = _byte(data, at)
        sizes.append(strings)
        lengths = []
        for _ in range(strings - (number == count - 1)):
            length, at = _read_varint(data, at)
            lengths.append(length)
        directory.append(lengths)
    if data[at : at + 2] != _crc16(data[:at]):
        raise IcmError("the header of the file is truncated or altered: its checksum differs")
    header = Header(data[4:8], (height, width), grey, quality)
    if flags >> 6 or not count or not all(1 <= size <= _MAX_STRINGS for size in sizes):
        raise IcmError("the header of the file is of no known kind")
    if not (1 <= height < _MAX_SIDE and 1 <= width < _MAX_SIDE):
        raise IcmError(f"the file claims an impossible image of {height}×{width} pixels")
    if quality is not None and quality > 100 * QUALITY_STEPS:
        raise IcmError(f"the file claims an impossible quality of {quality / QUALITY_STEPS}")
    return header, directory, at


def _require_layers(directory, layers: int | None) -> int:
    wanted = len(directory) if layers is None else layers
    if not isinstance(wanted, int) or not 1 <= wanted <= len(directory):
        raise IcmError(f"{layers!r} layers asked for; the file has {len(directory)}")
    return wanted


def _read_layers(data: bytes, at: int, directory, wanted: int) -> tuple[Layer, ...]:
    found = []
    for number, lengths in enumerate(directory[:wanted]):
        body = at + _SEALS
        if number == len(directory) - 1:
            lengths = [*lengths, len(data) - body - sum(lengths)]
        end = body + sum(lengths)
        whole = lengths[-1] >= 0 and end <= len(data)
        if not whole or data[at : at + 2] != _crc16(data[body:end]):
            raise IcmError(
                f"layer {number + 1} of {len(directory)} is truncated or altered: its checksum "
                f"differs{_of_those_before(number)}"
            )
        strings = []
        for length in lengths:
            strings.append(data[body : body + length])
            body += length
        found.append(Layer(tuple(strings), int.from_bytes(data[at + 2 : at + 6], "little")))
        at = end
    return tuple(found)


def _of_those_before(number: int) -> str:
    """What a damaged layer leaves; what can be made of it, the model knows."""
    if not number:
        return ""
    whole = "1 is" if number == 1 else f"{number} are"
    return (
        f"; the first {whole} whole, for what needs no more: icm detect, verify --layers {number}"
    )


def prefix(data: bytes, layers: int) -> bytes:
    """The beginning of a whole stream that holds its first `layers` layers.

    Raises: IcmError as `unpack`.
    """
    later = unpack(data).layers[layers:]
    return data[: len(data) - sum(_SEALS + sum(map(len, layer.strings)) for layer in later)]


def overhead(data: bytes, layers: int | None = None) -> int:
    """Bytes beside the strings of a packed stream, or of its first `layers` layers."""
    strings = (len(string) for layer in unpack(data, layers).layers for string in layer.strings)
    return len(data) - sum(strings)


def _crc16(data: bytes) -> bytes:
    return binascii.crc_hqx(data, 0).to_bytes(2, "big")


def _byte(data: bytes, at: int) -> tuple[int, int]:
    if at >= len(data):
        raise IcmError("the header of the file is truncated")
    return data[at], at + 1


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        byte, at = _byte(data, at)
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            if shift and not byte:
                break  # a longer form than `_varint` writes
            return value, at
    raise IcmError("the header of the file is damaged")
