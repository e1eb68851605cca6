"""The stream: nothing but what `pack` writes is read, and nothing unchecked is believed."""

import binascii
import io
import zlib

import hypothesis
import hypothesis.strategies as st
import pytest

from icm_jax.coding import container
from icm_jax.errors import IcmError

MANY = hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
HEADER = container.Header(b"abcd", (480, 1))
LAYERS = [((b"hyper", b"", b"latents" * 30), 0xDEADBEEF), ((b"more" * 40, b"end"), 7)]


def crc16(data: bytes) -> bytes:
    return binascii.crc_hqx(data, 0).to_bytes(2, "big")


def test_golden_bytes():
    header = container.Header(b"abcd", (480, 1), grey=True, quality=4321)
    data = container.pack(header, [((b"xyz", b"w"), 0xDEADBEEF)])
    head = bytes.fromhex("49434d02 61626364 31 e003 01 e121 02 03")
    sealed = zlib.crc32(b"xyzw", zlib.crc32(head, 0xDEADBEEF)).to_bytes(4, "little")
    assert data == head + crc16(head) + crc16(b"xyzw") + sealed + b"xyzw"


@MANY
@hypothesis.given(
    st.builds(
        container.Header,
        st.binary(min_size=4, max_size=4),
        st.tuples(st.integers(1, 2**21 - 1), st.integers(1, 2**21 - 1)),
        st.booleans(),
        st.none() | st.integers(0, 10000),
    ),
    st.lists(
        st.tuples(
            st.lists(st.binary(max_size=300), min_size=1, max_size=3).map(tuple),
            st.integers(0, 2**32 - 1),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_round_trip(header, layers):
    data = container.pack(header, layers)
    stream = container.unpack(data)
    assert stream.header == header
    assert [layer.strings for layer in stream.layers] == [strings for strings, _ in layers]
    for layer, (strings, crc) in zip(stream.layers, layers, strict=True):
        assert layer.seal == container.seal(stream.head, strings, crc)
    assert container.overhead(data) == len(data) - sum(len(s) for x, _ in layers for s in x)
    for count in range(1, len(layers) + 1):
        assert container.unpack(data, count).layers == stream.layers[:count]


def test_every_truncation_and_every_altered_byte_is_an_error():
    data = container.pack(HEADER, LAYERS)
    for length in range(len(data)):
        with pytest.raises(IcmError):
            container.unpack(data[:length])
    for at in [*range(4), *range(8, len(data))]:  # the fingerprint is the codec's to judge
        altered = data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]
        try:
            stream = container.unpack(altered)
        except IcmError:
            continue
        sealed = (
            container.seal(stream.head, strings, crc)
            for (strings, crc), _ in zip(LAYERS, stream.layers, strict=True)
        )
        assert [layer.seal for layer in stream.layers] != list(sealed)


def test_a_prefix_with_a_whole_layer_is_read_up_to_it():
    data = container.pack(HEADER, LAYERS)
    whole = container.unpack(data)
    body = sum(map(len, whole.layers[0].strings))
    end = len(whole.head) + 2 + 6 + body
    assert end < len(data)
    for length in range(end, len(data)):
        prefix = container.unpack(data[:length], layers=1)
        assert prefix.layers == whole.layers[:1]
        with pytest.raises(IcmError, match="the first 1 is whole"):
            container.unpack(data[:length])
    with pytest.raises(IcmError, match="layer 1 of 2"):
        container.unpack(data[: end - 1], layers=1)
    for wrong in (0, 3):
        with pytest.raises(IcmError, match="the file has 2"):
            container.unpack(data, layers=wrong)


def test_a_first_layer_is_received_while_the_rest_is_on_its_way():
    data = container.pack(HEADER, LAYERS)
    first = container.prefix(data, 1)
    assert container.unpack(first, 1).layers == container.unpack(data).layers[:1]
    pipe = io.BytesIO(data)
    assert container.receive(pipe, 1) == first
    assert pipe.tell() == len(first)  # nothing more was waited for
    assert container.receive(io.BytesIO(data), 2) == data
    for length in range(len(first)):
        with pytest.raises(IcmError):
            container.unpack(container.receive(io.BytesIO(data[:length]), 1), 1)
    with pytest.raises(IcmError, match="not an"):
        container.receive(io.BytesIO(b"no" * 9000), 1)
    with pytest.raises(IcmError, match="the file has 2"):
        container.receive(io.BytesIO(data), 3)


def checked(head: bytes, rest: bytes = b"") -> bytes:
    """A file with right checksums, whatever its content."""
    return head + crc16(head) + crc16(rest) + bytes(4) + rest


@MANY
@hypothesis.given(st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(checked)))
def test_foreign_bytes_are_one_kind_of_error(data):
    with pytest.raises(IcmError):
        container.unpack(data)


@MANY
@hypothesis.given(st.binary(min_size=5, max_size=12), st.binary(max_size=30))
def test_what_is_read_is_what_would_be_written(directory, rest):
    """With right magic, version and checksums: an error, or a stream of exactly these bytes."""
    data = checked(b"ICM\x02abcd\x01" + directory, rest)
    try:
        stream = container.unpack(data)
    except IcmError:
        return
    again = container.pack(stream.header, [(layer.strings, 0) for layer in stream.layers])
    at = len(stream.head) + 4  # the seal differs: it is made of latents that nobody knows here
    assert again[:at] == data[:at] and again[at + 4 :] == data[at + 4 :]


@pytest.mark.parametrize(
    "head, message",
    [
        ("01 01 01 00", "no known kind"),  # a layer without strings
        ("00 01 01", "no known kind"),  # no layer
        ("41 01 01 01", "no known kind"),  # a flag that means nothing
        ("01 01 01 41" + 64 * "00", "no known kind"),  # too many strings
        ("01 01 01 02 ffffffff0f", "truncated or altered"),  # gigabytes claimed
        ("01 01 01 02 ffffffffff", "damaged"),  # a length without end
        ("01 8100 01 01", "damaged"),  # 1, written longer than needed
        ("01 00 01 01", "impossible"),  # no rows
        ("01 80808001 01 01", "impossible"),  # 2^21 rows
        ("21 01 01 914e 01", "impossible quality"),  # 100.01
    ],
)
def test_right_checksums_excuse_nothing(head, message):
    with pytest.raises(IcmError, match=message):
        container.unpack(checked(b"ICM\x02abcd" + bytes.fromhex(head)))


def test_other_formats_are_named():
    data = container.pack(HEADER, LAYERS)
    with pytest.raises(IcmError, match="version 9 is not known"):
        container.unpack(b"ICM\x09" + data[4:])
    with pytest.raises(IcmError, match=r"not an \.icm file"):
        container.unpack(b"\xff\xd8\xff\xe0 a JPEG")


@pytest.mark.parametrize("side", [1, 127, 128, 16384, 65535])
@pytest.mark.parametrize("sizes", [(0, 0), (127, 90_000), (16_383, 3_000_000)])
def test_overhead_of_one_layer_is_at_most_28_bytes(side, sizes):
    header = HEADER._replace(shape=(side, side), quality=10000)
    data = container.pack(header, [(tuple(b"s" * size for size in sizes), 0)])
    assert container.overhead(data) <= 28


@pytest.mark.parametrize(
    "header, layers, message",
    [
        ({}, [((b"",), 1 << 32)], "32 bits"),
        ({}, [((b"",), -1)], "32 bits"),
        ({"shape": (1, 1 << 21)}, LAYERS, "pixels"),
        ({"shape": (0, 4)}, LAYERS, "pixels"),
        ({"fingerprint": b""}, LAYERS, "4 bytes"),
        ({"quality": 10001}, LAYERS, "0 to 100"),
        ({}, [((b"",) * 65, 0)], "64 strings"),
        ({}, [((), 0)], "64 strings"),
        ({}, [], "0 layers"),
        ({}, LAYERS * 8, "16 layers"),
    ],
)
def test_what_does_not_fit_is_not_packed(header, layers, message):
    with pytest.raises(IcmError, match=message):
        container.pack(HEADER._replace(**header), layers)
