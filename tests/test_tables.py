"""Integer tables: the quantiser against brute force, the tables' price, what the coder looks up."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats

from icm_jax.coding import tables
from icm_jax.coding.tables import Tables
from icm_jax.errors import IcmError

FEW = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
MASSES = st.lists(st.floats(0, 1), min_size=1, max_size=5).filter(lambda w: sum(w) > 0)


def cost(pmf, counts):
    return -(pmf * np.log2(counts)).sum()


@FEW
@hypothesis.given(weights=MASSES, precision=st.integers(3, 6))
def test_no_other_way_from_the_rounded_masses_is_cheaper(weights, precision):
    """The rule only takes or only gives; among all ways to do that it must find the cheapest."""
    pmf, total = np.array(weights) / sum(weights), 1 << precision
    start = np.maximum(np.rint(pmf * total), 1).astype(int)
    surplus = start.sum() - total
    moves = itertools.product(range(abs(surplus) + 1), repeat=len(pmf))
    ways = (start - np.sign(surplus) * np.array(m) for m in moves if sum(m) == abs(surplus))
    least = min(cost(pmf, way) for way in ways if way.min() >= 1)
    counts = tables.quantise_pmf(pmf, precision)
    assert counts.sum() == total and counts.min() >= 1
    assert cost(pmf, counts) == pytest.approx(least, abs=1e-12)


@FEW
@hypothesis.given(
    pmfs=st.lists(st.lists(st.floats(0, 0.2), min_size=1, max_size=5), min_size=1, max_size=4),
    precision=st.integers(3, 16),
)
def test_every_row_is_a_cdf_that_ends_in_an_escape(pmfs, precision):
    made = tables.from_pmfs([np.array(p) for p in pmfs], range(len(pmfs)), precision)
    assert made.lengths.tolist() == [len(p) + 1 for p in pmfs]
    for start, length in zip(made.starts, made.lengths, strict=True):
        row = made.cdf[start : start + length + 2]
        assert row[0] == -precision and row[1] == 0 and row[-1] == 1 << precision
        assert (np.diff(row[1:]) >= 1).all()


@pytest.mark.parametrize("size", [3, 17, 100, 1000])
def test_of_equal_masses_the_first_ones_change(size):
    """Ties beyond sixteen entries are where a library sort would leave the order open."""
    changed = tables.quantise_pmf(np.full(size, 1 / size), 12) - round(4096 / size)
    assert 0 < np.count_nonzero(changed) < size
    assert abs(changed[0]) == 1 and (np.diff(np.abs(changed)) <= 0).all()


def test_ties_go_to_the_lowest_index():
    assert tables.quantise_pmf(np.full(6, 1 / 6), 3).tolist() == [2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "index, offset, cdf",
    [
        (0, -1, [0, 1, 4094, 4095, 4096]),
        (10, -2, [0, 1, 378, 3717, 4094, 4095, 4096]),
        (20, -4, [0, 13, 107, 500, 1429, 2665, 3594, 3987, 4081, 4094, 4096]),
    ],
)
def test_gaussian_rows_equal_the_reference(index, offset, cdf):
    """TFC's Gaussian set at 12 bits and tail mass 2^-8, evaluated in float64."""
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


@pytest.mark.parametrize("precision, tail_mass", [(16, tables.TAIL_MASS), (12, 2.0**-8)])
def test_gaussian_rows_cost_less_than_one_percent(precision, tail_mass):
    """Escapes at their true price: Elias gamma and a sign. TFC's 12 bits cost up to 2 %."""
    made = tables.gaussian_tables(precision=precision, tail_mass=tail_mass)
    for row, scale in enumerate(tables.SCALES):
        reach = int(9 * scale) + 2
        values = np.arange(-reach, reach + 1)
        pmf = tables.gaussian_pmf(values, scale)
        assert pmf.sum() == pytest.approx(1, abs=1e-12)
        cdf = made.cdf[made.starts[row] + 1 :][: made.lengths[row] + 1]
        bits = precision - np.log2(np.diff(cdf))
        top = made.rows[row, 1]
        symbol = values - made.offsets[row]
        outside = (symbol < 0) | (symbol >= top)
        gamma = np.where(symbol < 0, -symbol, symbol - top + 1)
        spent = bits[np.where(outside, top, symbol)]
        spent = spent + outside * 2 * (np.floor(np.log2(np.maximum(gamma, 1))) + 1)
        entropy = -(pmf[pmf > 0] * np.log2(pmf[pmf > 0])).sum()
        limit = 0.01 if precision == 16 else 0.02
        assert (pmf * spent).sum() <= entropy * (1 + limit) + 2e-3 * (precision < 16) + 1e-4


@FEW
@hypothesis.given(precisions=st.lists(st.integers(1, 16), min_size=1, max_size=4), data=st.data())
def test_lookup_names_the_symbol_in_which_a_bucket_begins(precisions, data):
    rows = []
    for p in precisions:
        inner = data.draw(st.sets(st.integers(1, (1 << p) - 1), max_size=20))
        ambiguous = rows and rows[-1][-1] == p
        sign = -1 if ambiguous else data.draw(st.sampled_from([-1, 1]))
        rows.append([sign * p, 0, *sorted(inner), 1 << p])
    made = Tables(np.concatenate(rows), np.arange(len(rows)))
    for row, own, lookup in zip(rows, made.rows, made.lookup, strict=True):
        first, count, precision, _, escape = own.tolist()
        assert (precision, escape) == (abs(row[0]), row[0] < 0)
        assert made.cdf[first : first + len(row) - 1].tolist() == row[1:]
        assert count == len(row) - 2 - escape
        width = max(1, (1 << precision) >> tables.LOOKUP_BITS)
        for bucket in range((1 << precision) // width):
            symbol = int(lookup[bucket])
            assert row[1 + symbol] <= bucket * width < row[2 + symbol]


@pytest.mark.parametrize(
    "pmfs, offsets, precision, message",
    [
        ([], [], 12, "at least one row"),
        ([[0.5, 0.6]], [0], 12, "more than 1"),
        ([[0.5, np.nan]], [0], 12, "finite"),
        ([[-0.1]], [0], 12, "negative"),
        ([[0.5]], [0], 17, "precision"),
        ([[0.5]], [0], -1, "precision"),
        ([[0.1] * 8], [0], 3, "9 symbols"),
        ([[0.5]], [0, 1], 12, "1 table rows but 2 offsets"),
        ([[0.5]], [2**31], 12, "32 bits"),
        ([[0.5]], [0.5], 12, "integer"),
    ],
)
def test_unusable_masses_are_refused(pmfs, offsets, precision, message):
    with pytest.raises(IcmError, match=message):
        tables.from_pmfs([np.array(p) for p in pmfs], offsets, precision)


@pytest.mark.parametrize("cdf", [[0, 1], [-12, 0, 5, 3, 4096], [-12, 1, 4096], [-17, 0, 1], []])
def test_malformed_tables_are_refused(cdf):
    with pytest.raises(IcmError):
        Tables(np.array(cdf, np.int32), np.array([0]))


def test_digest_tells_tables_apart():
    one, other = (Tables(np.array([-1, 0, 1, 2]), np.array([offset])) for offset in (0, 1))
    same = Tables(np.array([-1, 0, 1, 2]), np.array([0]))
    assert one.digest == same.digest != other.digest
    with pytest.raises(ValueError, match="read-only"):
        one.cdf[1] = 1


def test_a_header_that_continues_the_row_before_is_refused():
    """The official ops read the 16 after [4, 0, 16] as one more symbol."""
    with pytest.raises(IcmError, match="precision 16 after a row of precision 4"):
        Tables(np.array([4, 0, 16, 16, 0, 65536]), np.array([0, 0]))
    Tables(np.array([4, 0, 16, -16, 0, 65536]), np.array([0, 0]))
