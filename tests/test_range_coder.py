"""The range coder byte for byte: stored streams, the format's prose, damage, the official ops."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from icm_jax import compiled as compiled_module
from icm_jax.coding import range_coder, tables
from icm_jax.coding.tables import Tables
from icm_jax.compiled import compiled
from icm_jax.errors import IcmError

HAS_TFC = importlib.util.find_spec("tensorflow_compression_ops") is not None
NEEDS_TFC = pytest.mark.skipif(not HAS_TFC, reason="no official ops here (extra `tfc`)")
CODERS = ["native", pytest.param("tfc", marks=[NEEDS_TFC, pytest.mark.tfc])]
GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "range_coder.json").read_text())
MANY = hypothesis.settings(max_examples=150, deadline=None, derandomize=True)


class ProseCoder:
    """The format's state machine as its description reads: carries wait, nothing is rewritten.

    The package adds carries to bytes that are already out; this one holds a word and counts the
    bytes behind it until it knows. Equal bytes, trailing zeros included, by another road.
    """

    def __init__(self):
        self.base, self.last, self.word, self.behind, self.out = 0, 2**32 - 1, None, 0, b""

    def put(self, low, high, precision):
        size = self.last + 1
        start, stop = size * low >> precision, (size * high >> precision) - 1
        carried, self.base = divmod(self.base + start, 2**32)
        self.last = stop - start
        short = self.last < 2**16
        if self.base + self.last >= 2**32:
            if short:
                self._shift()
                self.behind += 2
            return
        if self.word is not None:
            word, fill = (self.word, b"\x00") if carried else (self.word - 1, b"\xff")
            self.out += word.to_bytes(2, "big") + self.behind * fill
            self.word, self.behind = None, 0
        if short:
            top = self.base >> 16
            self._shift()
            if self.base + self.last < 2**32:
                self.out += top.to_bytes(2, "big")
            else:
                self.word = top + 1

    def _shift(self):
        self.base, self.last = self.base << 16 & 0xFFFFFFFF, self.last << 16 | 0xFFFF

    def finish(self):
        if self.word is not None:
            tail = self.word.to_bytes(2, "big")
        elif self.base == 0:
            return self.out
        else:
            byte = (self.base - 1 >> 24) + 1
            if byte <= self.base + self.last >> 24:
                return self.out + bytes([byte])
            tail = ((self.base - 1 >> 16) + 1).to_bytes(2, "big")
        return self.out + (tail if tail[1] else tail[:1])


def prose_encode(symbols, indexes, rows, offsets):
    coder = ProseCoder()
    for symbol, index in zip(symbols, indexes, strict=True):
        row, value = rows[index], symbol - offsets[index]
        ordinary = len(row) - 2 - (row[0] < 0)
        at = value if 0 <= value < ordinary else ordinary
        coder.put(row[1 + at], row[2 + at], abs(row[0]))
        if at == ordinary:
            digits = bin(-value if value < 0 else value - ordinary + 1)[2:]
            for bit in "0" * (len(digits) - 1) + digits + str(int(value < 0)):
                coder.put(int(bit), int(bit) + 1, 1)
    return coder.finish()


@st.composite
def messages(draw, always_escape):
    """Rows of every precision, and symbols for them, most of them ordinary."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        p = draw(st.integers(1, 16))
        inner = draw(st.sets(st.integers(1, (1 << p) - 1), max_size=9))
        ambiguous = rows and rows[-1][-1] == p  # see Tables
        sign = -1 if always_escape or ambiguous else draw(st.sampled_from([-1, 1]))
        rows.append([sign * p, 0, *sorted(inner), 1 << p])
    offsets = [draw(st.integers(-(2**20), 2**20)) for _ in rows]
    symbols, indexes = [], []
    for _ in range(draw(st.integers(0, 80))):
        index = draw(st.integers(0, len(rows) - 1))
        top = len(rows[index]) - 2
        far = st.integers(-(2**30) + 1, 2**30 - 2)
        inside = st.integers(0, max(top - 2, 0) if rows[index][0] < 0 else top - 1)
        near = st.integers(-3, top + 3)
        value = draw(inside if rows[index][0] > 0 else st.one_of(inside, inside, near, far))
        symbols.append(value + offsets[index])
        indexes.append(index)
    return rows, offsets, symbols, indexes


def arrays(rows, offsets, symbols, indexes):
    tables = Tables(np.concatenate(rows), np.array(offsets))
    return np.array(symbols, np.int32), np.array(indexes, np.int32), tables


# The vectors of TFC's format sheet: one table row, symbols, the whole string.
PUBLISHED = [
    ([-12, 0, 16, 4064, 4080, 4096], [], ""),
    ([-12, 0, 16, 4064, 4080, 4096], [1] * 8, "08"),
    ([-12, 0, 16, 4064, 4080, 4096], [0, 1, 2, 3, -1, 7, 1], "00fd02c0bff2a9"),
    ([-12, 0, 1000, 3000, 4000, 4096], [0, 1, 2, 1, 1, 0, 2, 2, 1, 0, -3, 100, 1], "28b8e4bb6911"),
    ([12, 0, 1, 4096], [0] * 5, "000000000000"),
    ([-1, 0, 1, 2], [0, 1, -1], "6e"),
]


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("row, symbols, expected", PUBLISHED)
def test_published_vectors(row, symbols, expected, coder):
    symbols, indexes, tables = arrays([row], [0], symbols, [0] * len(symbols))
    data = range_coder.encode(symbols, indexes, tables, coder)
    assert data.hex() == expected
    np.testing.assert_array_equal(range_coder.decode(data, indexes, tables, coder), symbols)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_stored_streams(case, coder):
    """Written by the official ops 2.17.0 from stored integer tables."""
    symbols, indexes, tables = arrays(
        [case["cdf"]], case["offsets"], case["symbols"], case["indexes"]
    )
    data = range_coder.encode(symbols, indexes, tables, coder)
    assert data.hex() == case["bytes"]
    np.testing.assert_array_equal(range_coder.decode(data, indexes, tables, coder), symbols)


@MANY
@hypothesis.given(messages(always_escape=False))
def test_bytes_equal_the_prose(message):
    rows, offsets, symbols, indexes = message
    values, index, tables = arrays(*message)
    data = range_coder.encode(values, index, tables)
    assert data == prose_encode(symbols, indexes, rows, offsets)
    np.testing.assert_array_equal(range_coder.decode(data, index, tables), values)


@pytest.mark.parametrize("coder", CODERS)
@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(messages(always_escape=True), st.integers(1, 5))
def test_a_string_decodes_in_parts(coder, message, length):
    values, index, tables = arrays(*message)
    data = range_coder.encode(values, index, tables)
    decoder, parts = range_coder.Decoder(data, tables, coder), range(0, len(index), length)
    found = [decoder.take(index[at : at + length]) for at in parts]
    np.testing.assert_array_equal(np.concatenate([*found, np.zeros(0, np.int32)]), values)
    assert decoder.take(index[:0], ends=True).shape == (0,)
    if len(parts) > 1:  # some of it is not read
        decoder = range_coder.Decoder(data + b"\1\1\1", tables, coder)
        decoder.take(index[:length])
        with pytest.raises(IcmError, match="truncated, altered"):
            decoder.take(index[:0], ends=True)


def test_long_carries():
    """Messages whose interval keeps straddling a power of two: the carry runs through many 0xFF."""
    row = [-16, 0, 32767, 32769, 65536]
    tables = Tables(np.array(row), np.array([0]))
    runs = 0
    for length in range(1, 60):
        for final in (0, 1, 2):
            symbols = [1] * length + [final] + [1] * 3
            indexes = np.zeros(len(symbols), np.int32)
            data = range_coder.encode(np.array(symbols, np.int32), indexes, tables)
            assert data == prose_encode(symbols, indexes, [row], [0])
            runs += b"\xff\xff\xff\xff" in data
            assert range_coder.decode(data, indexes, tables).tolist() == symbols
    assert runs > 10  # else this test has lost its point


@NEEDS_TFC
@pytest.mark.tfc
@MANY
@hypothesis.given(messages(always_escape=False))
def test_official_ops_agree_both_ways(message):
    values, index, tables = arrays(*message)
    native, official = (range_coder.encode(values, index, tables, c) for c in ("native", "tfc"))
    assert native == official
    for coder in ("native", "tfc"):
        np.testing.assert_array_equal(range_coder.decode(native, index, tables, coder), values)


@pytest.mark.parametrize("coder", CODERS)
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    message=messages(always_escape=True),
    cut=st.integers(0, 99),
    at=st.integers(0, 999),
    flip=st.integers(1, 255),
)
def test_a_damaged_stream_ends_in_an_error_or_in_values(coder, message, cut, at, flip):
    values, index, tables = arrays(*message)
    data = bytearray(range_coder.encode(values, index, tables))
    if data:
        data[at % len(data)] ^= flip
    try:
        symbols = range_coder.decode(bytes(data[: len(data) - cut % 4]), index, tables, coder)
    except IcmError:
        return
    assert symbols.dtype == np.int32 and symbols.shape == index.shape


@pytest.mark.parametrize("coder", CODERS)
def test_an_endless_escape_is_refused(coder):
    """Zeros without end after an escape: the bare official op never comes back from this."""
    tables = Tables(np.array([-2, 0, 1, 4]), np.array([0]))
    with pytest.raises(IcmError, match="truncated, altered"):
        range_coder.decode(b"\x40", np.zeros(1, np.int32), tables, coder)


@pytest.mark.parametrize("coder", CODERS)
def test_the_longest_escape(coder):
    """2^30 - 1 outside the row is coded; one more is refused by both ways."""
    row, index = [-2, 0, 1, 4], np.zeros(1, np.int32)
    tables = Tables(np.array(row), np.array([0]))
    longest = prose_encode([-(2**30) + 1], [0], [row], [0])
    assert range_coder.decode(longest, index, tables, coder).tolist() == [-(2**30) + 1]
    with pytest.raises(IcmError, match="truncated, altered"):
        range_coder.decode(prose_encode([-(2**30)], [0], [row], [0]), index, tables, coder)
    with pytest.raises(IcmError, match="2\\^30 or more"):
        range_coder.encode(np.array([-(2**30)], np.int32), index, tables, coder)


@pytest.mark.parametrize("coder", CODERS)
def test_bytes_left_over_are_refused(coder):
    tables, index = Tables(np.array([-2, 0, 1, 4]), np.array([0])), np.zeros(1, np.int32)
    data = range_coder.encode(np.array([-1], np.int32), index, tables)
    with pytest.raises(IcmError, match="truncated, altered"):
        range_coder.decode(data + bytes(8), index, tables, coder)


@pytest.mark.parametrize("coder", CODERS)
def test_the_ends_of_int32(coder):
    """Offsets may lie anywhere; what leaves int32 while decoding is damage, not a wrapped value."""
    row, top = [-2, 0, 3, 4], 2**31 - 1
    tables = Tables(np.array(row * 2), np.array([top, -top - 1]))
    symbols, indexes = np.array([top, -top - 1], np.int32), np.array([0, 1], np.int32)
    data = range_coder.encode(symbols, indexes, tables, coder)
    np.testing.assert_array_equal(range_coder.decode(data, indexes, tables, coder), symbols)
    over = range_coder.encode(
        np.array([5], np.int32), indexes[:1], Tables(np.array(row), np.array([0])), coder
    )
    with pytest.raises(IcmError, match="truncated, altered"):
        range_coder.decode(over, indexes[:1], tables, coder)


def test_strided_and_read_only_arrays_are_welcome():
    tables = Tables(np.array([-4, 0, 5, 12, 16]), np.array([-1]))
    symbols, indexes = np.arange(-4, 4, dtype=np.int32), np.zeros(8, np.int32)
    symbols.setflags(write=False)
    data = range_coder.encode(symbols[::2], indexes[::2], tables)
    assert data == range_coder.encode(symbols[::2].copy(), indexes[:4], tables)
    decoded = range_coder.decode(memoryview(data), indexes[::2], tables)
    assert decoded.tolist() == [-4, -2, 0, 2] and decoded.flags.writeable


def test_the_coder_is_named_or_refused():
    tables = Tables(np.array([-1, 0, 1, 2]), np.array([0]))
    with pytest.raises(IcmError, match="native, tfc"):
        range_coder.encode(np.zeros(1, np.int32), np.zeros(1, np.int32), tables, "rans")


def test_machine_code_is_kept_and_damage_to_it_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_module, "_place", lambda *_: tmp_path / "kept.o")
    symbols, rows, row = np.zeros(3, np.int32), np.zeros(3, np.int32), tables.gaussian_tables()
    out, stop = np.zeros(8, np.uint8), np.zeros(1, np.int64)
    streams = []
    for damage in (lambda kept: kept, lambda kept: kept[:-1] + b"x", lambda kept: b""):
        encode = compiled_module._found(range_coder._LOOPS, "encode")
        assert encode(symbols, rows, 3, row.cdf, row.rows, out, 8, stop) == range_coder.OK
        streams.append(out[: stop[0]].tobytes())
        kept = (tmp_path / "kept.o").read_bytes()
        (tmp_path / "kept.o").write_bytes(damage(kept))
    assert set(streams) == {range_coder.encode(symbols, rows, row)}
    monkeypatch.setattr(compiled_module, "_writable", lambda source: False)
    (tmp_path / "kept.o").unlink()
    assert compiled_module._found(range_coder._LOOPS, "encode")(
        symbols, rows, 3, row.cdf, row.rows, out, 8, stop
    ) == range_coder.OK and not (tmp_path / "kept.o").exists()  # fmt: skip


def test_a_process_that_only_codes_is_spared_numba():
    code = (
        "import sys, numpy; from icm_jax.coding import range_coder, tables;"
        "n = numpy.zeros(5, numpy.int32); t = tables.gaussian_tables();"
        "print(range_coder.decode(range_coder.encode(n, n, t), n, t).tolist() == [0] * 5,"
        "'numba' in sys.modules)"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.split() == [b"True", b"False"]


def test_compiles_where_no_cache_can_be_written():
    """A function without a file has no cache folder, as a read-only installation has none."""
    names = {}
    exec("def double(x):\n    return 2 * x", names)
    assert compiled(names["double"])(21) == 42


@pytest.mark.skipif(HAS_TFC, reason="the official ops are installed")
def test_the_official_coder_says_how_to_install_it():
    single = Tables(np.array([-1, 0, 1, 2]), np.array([0]))
    with pytest.raises(IcmError, match=r"icm_jax\[tfc\]"):
        range_coder.encode(np.zeros(1, np.int32), np.zeros(1, np.int32), single, "tfc")


@MANY
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
