"""Tables, range coder and stream against golden vectors, a slow reference and the official ops."""

import importlib.util
import math
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats

from icm_jax.coding import container, range_coder, tables
from icm_jax.coding.tables import Tables
from icm_jax.errors import IcmError

HAS_TFC = importlib.util.find_spec("tensorflow_compression_ops") is not None
CODERS = ["native", *(["tfc"] if HAS_TFC else [])]
GOLDEN = [
    ([-12, 0, 16, 4064, 4080, 4096], [], ""),
    ([-12, 0, 16, 4064, 4080, 4096], [1] * 8, "08"),
    ([-12, 0, 16, 4064, 4080, 4096], [0, 1, 2, 3, -1, 7, 1], "00fd02c0bff2a9"),
    ([-12, 0, 1000, 3000, 4000, 4096], [0, 1, 2, 1, 1, 0, 2, 2, 1, 0, -3, 100, 1], "28b8e4bb6911"),
    ([12, 0, 1, 4096], [0] * 5, "000000000000"),
    ([-1, 0, 1, 2], [0, 1, -1], "6e"),
]

hypothesis.settings.register_profile("icm", deadline=None, derandomize=True, max_examples=150)
hypothesis.settings.load_profile("icm")


def big_integer_encode(symbols, cdfs):
    """Range coding with unbounded integers: no carries to get wrong, hence the reference.

    The interval is [base, base + size) in units of 2^-bits; rounding as in the format.
    """
    base, size, shifted = 0, 1 << 32, 0
    for low, high, precision in cdfs(symbols):
        start = (size * low) >> precision
        size = ((size * high) >> precision) - start
        base += start
        if size <= 1 << 16:
            base, size, shifted = base << 16, size << 16, shifted + 2
    # The roundest number in the interval, by the format's three steps.
    if base == 0:
        return b""
    last = base + size - 1
    unit = next(unit for unit in (32, 24, 16) if ((base - 1) >> unit) + 1 <= last >> unit)
    value = (((base - 1) >> unit) + 1) << unit
    return value.to_bytes(4 + shifted, "big").rstrip(b"\0")


def acts(symbols, row):
    """The coding acts (low, high, precision) of symbols in one row, escapes spelt out."""
    precision, cdf = abs(row[0]), row[1:]
    ordinary = len(cdf) - 1 - (row[0] < 0)
    for symbol in symbols:
        inside = 0 <= symbol < ordinary
        index = symbol if inside else ordinary
        yield cdf[index], cdf[index + 1], precision
        if not inside:
            gamma = -symbol if symbol < 0 else symbol - ordinary + 1
            digits = bin(gamma)[2:]
            for bit in "0" * (len(digits) - 1) + digits + ("1" if symbol < 0 else "0"):
                yield int(bit), int(bit) + 1, 1


@st.composite
def rows(draw):
    precision = draw(st.integers(2, 16))
    size = draw(st.integers(2, min(12, 1 << precision)))
    inner = draw(
        st.lists(
            st.integers(1, (1 << precision) - 1),
            min_size=size - 1,
            max_size=size - 1,
            unique=True,
        )
        if (1 << precision) > size
        else st.just(list(range(1, size)))
    )
    return [-precision, 0, *sorted(inner), 1 << precision]


SYMBOLS = st.lists(st.one_of(st.integers(-3, 14), st.integers(-(2**29), 2**29)), max_size=60)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("row, symbols, expected", GOLDEN)
def test_golden_vectors(row, symbols, expected, coder):
    single = Tables(np.array(row), np.array([0]))
    symbols, indexes = np.array(symbols, np.int32), np.zeros(len(symbols), np.int32)
    data = range_coder.encode(symbols, indexes, single, coder)
    assert data.hex() == expected
    np.testing.assert_array_equal(range_coder.decode(data, indexes, single, coder), symbols)


@hypothesis.given(row=rows(), symbols=SYMBOLS)
def test_bytes_equal_a_coder_with_unbounded_integers(row, symbols):
    single = Tables(np.array(row), np.array([0]))
    values, indexes = np.array(symbols, np.int32), np.zeros(len(symbols), np.int32)
    data = range_coder.encode(values, indexes, single)
    assert data.rstrip(b"\0") == big_integer_encode(symbols, lambda s: acts(s, row))
    np.testing.assert_array_equal(range_coder.decode(data, indexes, single), values)


@pytest.mark.skipif(not HAS_TFC, reason="the official ops are not installed (extra `tfc`)")
@hypothesis.given(several=st.lists(rows(), min_size=1, max_size=4), data=st.data())
def test_bytes_equal_the_official_ops(several, data):
    many = Tables(
        np.concatenate(several),
        np.array(
            data.draw(st.lists(st.integers(-9, 9), min_size=len(several), max_size=len(several)))
        ),
    )
    symbols = np.array(data.draw(SYMBOLS), np.int32)
    pick = st.integers(0, len(several) - 1)
    indexes = np.array(
        data.draw(st.lists(pick, min_size=len(symbols), max_size=len(symbols))), np.int32
    )
    native, official = (
        range_coder.encode(symbols, indexes, many, coder) for coder in ("native", "tfc")
    )
    assert native == official
    for coder in ("native", "tfc"):
        np.testing.assert_array_equal(range_coder.decode(native, indexes, many, coder), symbols)


@pytest.mark.skipif(HAS_TFC, reason="the official ops are installed")
def test_the_official_coder_says_how_to_install_it():
    single = Tables(np.array([-1, 0, 1, 2]), np.array([0]))
    with pytest.raises(IcmError, match=r"icm_jax\[tfc\]"):
        range_coder.encode(np.zeros(1, np.int32), np.zeros(1, np.int32), single, "tfc")


@hypothesis.given(garbage=st.binary(max_size=40), length=st.integers(0, 50))
def test_garbage_ends_in_an_error_or_in_values(garbage, length):
    gaussian = tables.gaussian_tables(np.array([0.11, 3.0]))
    indexes = np.arange(length, dtype=np.int32) % 2
    try:
        symbols = range_coder.decode(garbage, indexes, gaussian)
    except IcmError:
        return
    assert symbols.shape == (length,)


def test_long_streams_are_as_short_as_their_information():
    rng = np.random.default_rng(0)
    gaussian = tables.gaussian_tables()
    indexes = rng.integers(0, 40, 20_000).astype(np.int32)
    scales = tables.SCALES[indexes]
    symbols = np.rint(rng.normal(0, scales)).astype(np.int32)
    data = range_coder.encode(symbols, indexes, gaussian)
    mass = [tables.gaussian_pmf(np.array([s]), c)[0] for s, c in zip(symbols, scales, strict=True)]
    bits = -np.log2(mass).sum()
    assert abs(8 * len(data) - bits) < 0.001 * bits + 32
    np.testing.assert_array_equal(range_coder.decode(data, indexes, gaussian), symbols)


@pytest.mark.parametrize(
    "symbols, indexes, message",
    [
        (np.zeros(2, np.int64), np.zeros(2, np.int32), "int32"),
        (np.zeros((1, 2), np.int32), np.zeros(2, np.int32), "rank 1"),
        (np.zeros(3, np.int32), np.zeros(2, np.int32), "3 symbols but 2"),
        (np.zeros(1, np.int32), np.array([1], np.int32), "outside the tables"),
        (np.zeros(1, np.int32), np.array([-1], np.int32), "outside the tables"),
        (np.array([-(2**30)], np.int32), np.zeros(1, np.int32), "2\\^30"),
    ],
)
@pytest.mark.parametrize("coder", CODERS)
def test_bad_arguments_are_refused(symbols, indexes, message, coder):
    single = Tables(np.array([-12, 0, 16, 4064, 4080, 4096]), np.array([0]))
    with pytest.raises(IcmError, match=message):
        range_coder.encode(symbols, indexes, single, coder)


@pytest.mark.parametrize("coder", CODERS)
def test_a_row_without_escape_refuses_what_it_cannot_code(coder):
    single = Tables(np.array([2, 0, 1, 4]), np.array([5]))
    with pytest.raises(IcmError, match="no escape"):
        range_coder.encode(np.array([7], np.int32), np.zeros(1, np.int32), single, coder)


@pytest.mark.parametrize("cdf", [[0, 1], [-12, 0, 5, 3, 4096], [-12, 1, 4096], [-17, 0, 1], []])
def test_malformed_tables_are_refused(cdf):
    with pytest.raises(IcmError):
        Tables(np.array(cdf, np.int32), np.array([0]))


@pytest.mark.parametrize(
    "index, offset, cdf",
    [
        (0, -1, [0, 1, 4094, 4095, 4096]),
        (10, -2, [0, 1, 378, 3717, 4094, 4095, 4096]),
        (20, -4, [0, 13, 107, 500, 1429, 2665, 3594, 3987, 4081, 4094, 4096]),
    ],
)
def test_gaussian_rows_equal_the_reference(index, offset, cdf):
    """papers.md 7.1: 12 bits, tail mass 2^-8."""
    gaussian = tables.gaussian_tables(precision=12, tail_mass=2.0**-8)
    start = gaussian.starts[index]
    assert gaussian.offsets[index] == offset
    assert gaussian.cdf[start : start + len(cdf) + 1].tolist() == [-12, *cdf]
    assert gaussian.lengths[[0, 31, 63]].tolist() == [4, 32, 1480]


@pytest.mark.parametrize("scale", [0.11, 1.0, 37.0])
def test_gaussian_masses_equal_scipy(scale):
    values = np.arange(-200, 201)
    upper, lower = (scipy.stats.norm.logcdf((-abs(values) + s) / scale) for s in (0.5, -0.5))
    expected = np.exp(upper) * -np.expm1(lower - upper)
    np.testing.assert_allclose(tables.gaussian_pmf(values, scale), expected, rtol=1e-9, atol=1e-300)


@hypothesis.given(
    weights=st.lists(st.floats(0, 1), min_size=1, max_size=5).filter(lambda w: sum(w) > 0),
    precision=st.integers(3, 5),
)
def test_quantised_masses_are_optimal(weights, precision):
    pmf = np.array(weights) / sum(weights)
    counts = tables.quantise_pmf(pmf, precision)
    assert counts.sum() == 1 << precision and counts.min() >= 1
    least = min(
        -(pmf * np.log2(np.array(option) / 2**precision)).sum()
        for option in compositions(1 << precision, len(pmf))
    )
    cost = -(pmf * np.log2(counts / 2**precision)).sum()
    assert cost <= least + 0.01 or math.isclose(cost, least, rel_tol=0.01)


def compositions(total, parts):
    if parts == 1:
        yield (total,)
        return
    for first in range(1, total - parts + 2):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def test_ties_go_to_the_lowest_index():
    counts = tables.quantise_pmf(np.full(6, 1 / 6), 3)  # 6 of 8: two entries get one more
    assert counts.tolist() == [2, 2, 1, 1, 1, 1]


def test_digest_tells_tables_apart():
    one, other = (Tables(np.array([-1, 0, 1, 2]), np.array([offset])) for offset in (0, 1))
    same = Tables(np.array([-1, 0, 1, 2]), np.array([0]))
    assert one.digest == same.digest != other.digest
    with pytest.raises(ValueError, match="read-only"):
        one.cdf[1] = 1


STREAM = container.Stream(b"abcd", 0xDEADBEEF, (480, 1), (b"hyper", b"", b"latents" * 30))


@hypothesis.given(
    st.builds(
        container.Stream,
        st.binary(min_size=4, max_size=4),
        st.integers(0, 2**32 - 1),
        st.tuples(st.integers(1, 2**21 - 1), st.integers(1, 2**21 - 1)),
        st.lists(st.binary(max_size=300), max_size=3).map(tuple),
    )
)
def test_stream_round_trip_and_overhead(stream):
    assert container.unpack(container.pack(stream)) == stream
    assert container.overhead(stream) <= 28


def test_stream_golden_bytes():
    data = container.pack(STREAM._replace(strings=(b"xy",)))
    body = bytes.fromhex("49434d0161626364efbeaddee0030101027879")
    assert data == body + zlib.crc32(body).to_bytes(4, "little")


def test_every_truncation_and_every_altered_byte_is_an_error():
    data = container.pack(STREAM)
    for length in range(len(data)):
        with pytest.raises(IcmError):
            container.unpack(data[:length])
    for at in range(len(data)):
        with pytest.raises(IcmError):
            container.unpack(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])


def test_a_right_checksum_does_not_excuse_a_wrong_directory():
    body = bytes.fromhex("49434d016162636400000000010101ffffffff0f")
    with pytest.raises(IcmError, match="directory"):
        container.unpack(body + zlib.crc32(body).to_bytes(4, "little"))


def test_impossible_streams_are_not_packed():
    with pytest.raises(IcmError, match="pixels"):
        container.pack(STREAM._replace(shape=(0, 4)))
    with pytest.raises(IcmError, match="4 bytes"):
        container.pack(STREAM._replace(fingerprint=b""))
