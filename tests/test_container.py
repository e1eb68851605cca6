"""The stream: nothing but what `pack` writes is read, and nothing unchecked is believed."""

import zlib

import hypothesis
import hypothesis.strategies as st
import pytest

from icm_jax.coding import container
from icm_jax.errors import IcmError

MANY = hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
STREAM = container.Stream(b"abcd", 1, (480, 640), (b"z" * 20, b"y" * 900))


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
        ("01 01 01 02 aa", "directory"),  # two bytes claimed, one there
        ("01 01 41" + 64 * "00", "directory"),  # too many segments
        ("8100 01 01 01 aa", "damaged"),  # 1, written longer than needed
        ("01 01 01 ffffffffff", "damaged"),  # a length without end
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


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383])
@pytest.mark.parametrize("segments", [1, 2, 3])
def test_overhead_is_what_the_docstring_says(size, segments):
    stream = STREAM._replace(shape=(16383, 16383), strings=(b"s" * size,) * segments)
    assert container.overhead(stream) <= 21 + 2 * segments <= 27
    assert container.unpack(container.pack(stream)) == stream


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latents_crc": 1 << 32}, "32 bits"),
        ({"latents_crc": -1}, "32 bits"),
        ({"shape": (1, 1 << 21)}, "pixels"),
        ({"strings": (b"",) * 65}, "65 segments"),
    ],
)
def test_what_does_not_fit_is_not_packed(change, message):
    with pytest.raises(IcmError, match=message):
        container.pack(STREAM._replace(**change))
