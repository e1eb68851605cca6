"""The stream: nothing but what `pack` writes is read, and nothing unchecked is believed."""

import zlib

import hypothesis
import hypothesis.strategies as st
import pytest

from icm_jax.coding import container
from icm_jax.errors import IcmError

MANY = hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
STREAM = container.Stream(b"abcd", 0xDEADBEEF, (480, 1), (b"hyper", b"", b"latents" * 30))


def test_golden_bytes():
    data = container.pack(STREAM._replace(strings=(b"xyz", b"w")))
    body = bytes.fromhex("49434d01 61626364 efbeadde e003 01 02 03 78797a 77")
    assert data == body + zlib.crc32(body).to_bytes(4, "little")


@MANY
@hypothesis.given(
    st.builds(
        container.Stream,
        st.binary(min_size=4, max_size=4),
        st.integers(0, 2**32 - 1),
        st.tuples(st.integers(1, 2**21 - 1), st.integers(1, 2**21 - 1)),
        st.lists(st.binary(max_size=300), max_size=3).map(tuple),
    )
)
def test_round_trip_and_overhead(stream):
    assert container.unpack(container.pack(stream)) == stream
    assert container.overhead(stream) <= 27


def test_every_truncation_and_every_altered_byte_is_an_error():
    data = container.pack(STREAM)
    for length in range(len(data)):
        with pytest.raises(IcmError):
            container.unpack(data[:length])
    for at in range(len(data)):
        with pytest.raises(IcmError):
            container.unpack(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])


def sealed(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


@MANY
@hypothesis.given(st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(sealed)))
def test_foreign_bytes_are_one_kind_of_error(data):
    with pytest.raises(IcmError):
        container.unpack(data)


@MANY
@hypothesis.given(st.binary(min_size=8, max_size=40))
def test_what_is_read_is_what_would_be_written(rest):
    """With a right magic, version and checksum: an error, or a stream of exactly these bytes."""
    data = sealed(b"ICM\x01" + rest)
    try:
        stream = container.unpack(data)
    except IcmError:
        return
    assert container.pack(stream) == data


@pytest.mark.parametrize(
    "directory, message",
    [
        ("01 01 00 aa", "directory"),  # no segment, but a byte
        ("01 01 02 02 aa", "directory"),  # two bytes claimed, one there
        ("01 01 03 01 01 aa", "directory"),  # the same over two strings
        ("01 01 02 ffffffff0f aa", "directory"),  # gigabytes claimed
        ("01 01 41" + 64 * "00", "directory"),  # too many segments
        ("8100 01 01 01 aa", "damaged"),  # 1, written longer than needed
        ("01 01 02 ffffffffff", "damaged"),  # a length without end
        ("00 01 01 01 aa", "impossible"),  # no rows
        ("80808001 01 01 01 aa", "impossible"),  # 2^21 rows
        ("80", "truncated"),
    ],
)
def test_a_right_checksum_excuses_nothing(directory, message):
    data = sealed(b"ICM\x01abcd" + bytes(4) + bytes.fromhex(directory))
    with pytest.raises(IcmError, match=message):
        container.unpack(data)


def test_other_formats_are_named():
    data = container.pack(STREAM)
    with pytest.raises(IcmError, match="format 9 is not known"):
        container.unpack(sealed(b"ICM\x09" + data[4:-4]))
    with pytest.raises(IcmError, match="not an icm_jax stream"):
        container.unpack(b"\xff\xd8\xff\xe0 a JPEG")


@pytest.mark.parametrize("side", [1, 127, 128, 16384, 65535])
@pytest.mark.parametrize("sizes", [(0, 0, 0), (127, 128, 90_000), (16_383, 90_000, 3_000_000)])
def test_overhead_is_at_most_28_bytes(side, sizes):
    stream = STREAM._replace(shape=(side, side), strings=tuple(b"s" * size for size in sizes))
    assert container.overhead(stream) <= 28
    assert container.unpack(container.pack(stream)) == stream


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latents_crc": 1 << 32}, "32 bits"),
        ({"latents_crc": -1}, "32 bits"),
        ({"shape": (1, 1 << 21)}, "pixels"),
        ({"shape": (0, 4)}, "pixels"),
        ({"fingerprint": b""}, "4 bytes"),
        ({"strings": (b"",) * 65}, "65 segments"),
    ],
)
def test_what_does_not_fit_is_not_packed(change, message):
    with pytest.raises(IcmError, match=message):
        container.pack(STREAM._replace(**change))
