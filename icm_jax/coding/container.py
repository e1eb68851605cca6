"""The stream of one image: a short header, the strings of the segments, a checksum.

    bytes   content
    3       b"ICM"
    1       format version
    4       fingerprint of the model that wrote it (weights and tables)
    4       CRC-32 of the integer latents, little-endian
    1-3 ×2  height and width of the image in pixels (LEB128)
    1       number of segments
    1-5 ×n  length of each string but the last, which takes the rest (LEB128)
    ...     the strings, in the codec's order
    4       CRC-32 of everything before it, little-endian

Beside the strings that is 19 to 23 bytes for one segment and at most 28 for three, for images below
65,536 pixels a side, a first string below 16 KiB and a second below 2 MiB.
"""

import zlib
from typing import NamedTuple

from icm_jax.errors import IcmError

MAGIC = b"ICM"
VERSION = 1
_MAX_SIDE = 1 << 21
_MAX_SEGMENTS = 64


class Stream(NamedTuple):
    """One coded image.

    Attributes:
      fingerprint: 4 bytes that name the frozen model.
      latents_crc: CRC-32 of the integer latents that a right decode gives.
      shape: (height, width) of the image in pixels.
      strings: one byte string per segment, in the codec's order.
    """

    fingerprint: bytes
    latents_crc: int
    shape: tuple[int, int]
    strings: tuple[bytes, ...]


def pack(stream: Stream) -> bytes:
    """The bytes of a stream. Raises IcmError if a field does not fit the format."""
    height, width = stream.shape
    if len(stream.fingerprint) != 4:
        raise IcmError(f"a fingerprint has 4 bytes, not {len(stream.fingerprint)}")
    if not (1 <= height < _MAX_SIDE and 1 <= width < _MAX_SIDE):
        raise IcmError(f"image sides must be 1 to {_MAX_SIDE - 1} pixels, not {height}×{width}")
    if not 0 <= stream.latents_crc < 1 << 32:
        raise IcmError(f"a CRC-32 has 32 bits; {stream.latents_crc} does not fit")
    if len(stream.strings) > _MAX_SEGMENTS:
        raise IcmError(f"{len(stream.strings)} segments; the format holds {_MAX_SEGMENTS}")
    body = b"".join(
        [
            MAGIC,
            bytes([VERSION]),
            stream.fingerprint,
            stream.latents_crc.to_bytes(4, "little"),
            _varint(height),
            _varint(width),
            bytes([len(stream.strings)]),
            *(_varint(len(string)) for string in stream.strings[:-1]),
            *stream.strings,
        ]
    )
    return body + zlib.crc32(body).to_bytes(4, "little")


def unpack(data: bytes) -> Stream:
    """The inverse of `pack`. Raises IcmError on anything that `pack` has not written whole."""
    data = bytes(data)
    if data[:3] != MAGIC:
        raise IcmError(f"not an icm_jax stream: it starts with {data[:3]!r}, not {MAGIC!r}")
    if len(data) > 3 and data[3] != VERSION:
        raise IcmError(f"stream format {data[3]} is not known here; this version reads {VERSION}")
    if len(data) < 19 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise IcmError("the stream is truncated or altered: its checksum does not match")
    at = 12
    (height, at), (width, at) = (pair := _read_varint(data, at)), _read_varint(data, pair[1])
    count, at = data[at], at + 1
    lengths = []
    for _ in range(min(count, _MAX_SEGMENTS) - 1):
        length, at = _read_varint(data, at)
        lengths.append(length)
    rest = len(data) - 4 - at - sum(lengths)
    if rest < 0 or count > _MAX_SEGMENTS or (count == 0 and rest):
        raise IcmError("the stream's directory does not match its length")
    lengths += [rest] if count else []
    if not (1 <= height < _MAX_SIDE and 1 <= width < _MAX_SIDE):
        raise IcmError(f"the stream claims an impossible image of {height}×{width} pixels")
    strings = []
    for length in lengths:
        strings.append(data[at : at + length])
        at += length
    crc = int.from_bytes(data[8:12], "little")
    return Stream(data[4:8], crc, (height, width), tuple(strings))


def overhead(stream: Stream) -> int:
    """Bytes of the packed stream beside its strings."""
    return len(pack(stream)) - sum(map(len, stream.strings))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(data) - 4:
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            if shift and not data[at - 1]:
                break  # a longer form than `_varint` writes
            return value, at
    raise IcmError("the stream's header is damaged")
