"""Probabilities to integer CDF tables, once, by a rule with one result on every machine.

The layout is tensorflow-compression's: a row is `[-p, 0, c1, ..., 2^p]`, all rows lie end to end in
one int32 array, `p` is the precision in bits, and its minus sign says that the last symbol is an
escape, followed in the stream by an Elias-gamma code. A table row `r` codes the integers
`offsets[r], offsets[r] + 1, ...`; everything else goes through the escape.

tensorflow-compression leaves the order of ties to its sort, so that its tables differ between
hosts. Here ties go by (cost, index), and tables are stored with the model all the same.
"""

import dataclasses
import functools
import hashlib
import heapq
import math
import statistics
from collections.abc import Sequence

import numpy as np

from icm_jax.errors import IcmError

PRECISION = 16
TAIL_MASS = 2.0**-16
LOOKUP_BITS = 8
SCALES = np.exp(np.linspace(math.log(0.11), math.log(256.0), 64))
"""The field's 64 scales of a Gaussian conditional (Ballé et al. 2018), float64."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """Immutable integer CDF rows.

    Attributes:
      cdf: int32 [T], the rows end to end in tensorflow-compression's layout.
      offsets: int32 [R], the integer that each row's first symbol stands for.
    """

    cdf: np.ndarray
    offsets: np.ndarray

    def __post_init__(self):
        cdf = _frozen_int32(self.cdf, "cdf")
        object.__setattr__(self, "cdf", cdf)
        object.__setattr__(self, "offsets", _frozen_int32(self.offsets, "offsets"))
        if len(self.starts) != len(self.offsets):
            raise IcmError(f"{len(self.starts)} table rows but {len(self.offsets)} offsets")

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """int32 [R]: where each row begins in `cdf` (at its precision)."""
        starts, at = [], 0
        while at < len(self.cdf):
            precision = abs(int(self.cdf[at]))
            if not 1 <= precision <= 16:
                raise IcmError(f"table row {len(starts)} has precision {precision}, not 1 to 16")
            longest = self.cdf[at + 1 : at + 2 + (1 << precision)]
            ends = np.flatnonzero(longest == 1 << precision)
            if not len(ends):
                raise IcmError(f"table row {len(starts)} does not end in 2^{precision}")
            row = longest[: ends[0] + 1]
            if len(row) < 2 or row[0] != 0 or (np.diff(row) < 1).any():
                raise IcmError(f"table row {len(starts)} is not an increasing CDF from 0")
            if (longest[ends[0] + 1 : ends[0] + 2] == 1 << precision).any():
                # The official ops take such a header for one more symbol, of no probability.
                raise IcmError(
                    f"table row {len(starts) + 1} must not have the precision {1 << precision} "
                    f"after a row of precision {precision}: its beginning would be ambiguous"
                )
            starts.append(at)
            at += 2 + int(ends[0])
        return np.asarray(starts, np.int32)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int32 [R]: the number of symbols in each row, the escape included."""
        return (np.diff(self.starts, append=len(self.cdf)) - 2).astype(np.int32)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """int32 [R, 5], what the coder needs of a row: where its leading 0 lies in `cdf`, the
        number of its symbols without the escape, its precision, its offset, 1 for an escape."""
        precision = self.cdf[self.starts]
        escape = precision < 0
        columns = (self.starts + 1, self.lengths - escape, abs(precision), self.offsets, escape)
        return _frozen_int32(np.stack(columns, axis=1), "rows", rank=2)

    @functools.cached_property
    def lookup(self) -> np.ndarray:
        """uint16 [R, 2^LOOKUP_BITS]: the symbol that each bucket of a row's 2^p begins in."""
        table = np.zeros((len(self.starts), 1 << LOOKUP_BITS), np.uint16)
        for row, start, length in zip(table, self.starts, self.lengths, strict=True):
            precision = abs(int(self.cdf[start]))
            shift = max(precision - LOOKUP_BITS, 0)
            begins = np.arange(1 << (precision - shift)) << shift
            cdf = self.cdf[start + 1 : start + 2 + length]
            row[: len(begins)] = np.searchsorted(cdf, begins, side="right") - 1
        table.setflags(write=False)
        return table

    @functools.cached_property
    def digest(self) -> bytes:
        """sha256 of the integers: equal digests mean equal streams."""
        parts = (self.cdf.astype("<i4").tobytes(), self.offsets.astype("<i4").tobytes())
        return hashlib.sha256(len(parts[0]).to_bytes(8, "little") + b"".join(parts)).digest()


def from_pmfs(
    pmfs: Sequence[np.ndarray], offsets: Sequence[int] | np.ndarray, precision: int = PRECISION
) -> Tables:
    """Tables with an escape symbol from probabilities of consecutive integers.

    Args:
      pmfs: one float64 [L_r] per row, the probabilities of L_r integers from offsets[r] on; what
        is missing to 1 becomes the escape's.
      offsets: the first integer of each row.
      precision: bits of the integer probabilities, 1 to 16.

    Raises:
      IcmError: a probability is negative or not finite, probabilities sum to more than 1, or a row
        has no room at this precision.
    """
    if not len(pmfs):
        raise IcmError("tables need at least one row of probabilities")
    rows = []
    for number, pmf in enumerate(pmfs):
        pmf = np.asarray(pmf, np.float64)
        if pmf.ndim != 1 or not len(pmf) or not np.isfinite(pmf).all() or (pmf < 0).any():
            raise IcmError(f"row {number}: probabilities must be finite and not negative")
        if pmf.sum() > 1 + 1e-6:
            raise IcmError(f"row {number}: probabilities sum to {pmf.sum()}, more than 1")
        pmf = np.append(pmf, max(1.0 - pmf.sum(), 0.0))
        counts = quantise_pmf(pmf, precision)
        rows.append(np.concatenate([[-precision, 0], np.cumsum(counts)]))
    return Tables(np.concatenate(rows), np.asarray(offsets))


def quantise_pmf(pmf: np.ndarray, precision: int) -> np.ndarray:
    """Integers >= 1 that sum to 2^precision, at the least cost in expected bits.

    Starts from the rounded probabilities, then takes from (or gives to) one entry at a time where
    that costs least (gains most); ties go to the lowest index (docs/papers.md 7.1).

    Args:
      pmf: float64 [L]; precision: 1 to 16.
    Returns: int64 [L].
    Raises: IcmError if L > 2^precision.

    >>> quantise_pmf(np.array([0.5, 0.3, 0.2, 0.0]), 4)
    array([7, 5, 3, 1])
    """
    if not 1 <= precision <= 16 or len(pmf) > 1 << precision:
        raise IcmError(f"{len(pmf)} symbols do not fit {precision} bits of precision (1 to 16)")
    total = 1 << precision
    counts = np.maximum(np.rint(pmf * total), 1).astype(np.int64)
    step = -1 if counts.sum() > total else 1

    def cost(index: int) -> float:
        count, mass = int(counts[index]), float(pmf[index])
        if step > 0:
            return -mass * (math.log2(count + 1) - math.log2(count))
        return mass * (math.log2(count) - math.log2(count - 1)) if count > 1 else math.inf

    heap = [(cost(index), index) for index in range(len(pmf))]
    heapq.heapify(heap)
    for _ in range(abs(int(counts.sum()) - total)):
        index = heap[0][1]
        counts[index] += step
        heapq.heapreplace(heap, (cost(index), index))
    return counts


def gaussian_tables(
    scales: np.ndarray = SCALES, precision: int = PRECISION, tail_mass: float = TAIL_MASS
) -> Tables:
    """Tables of a zero-mean Gaussian convolved with U(-1/2, 1/2), one row per scale.

    The support is cut at the quantiles tail_mass/2 of the noise-free density (docs/papers.md 7.1).
    """
    pmfs, offsets = [], []
    quantile = statistics.NormalDist().inv_cdf(1 - tail_mass / 2)
    for scale in scales:
        top = math.ceil(scale * quantile)
        pmfs.append(gaussian_pmf(np.arange(-top, top + 1), float(scale)))
        offsets.append(-top)
    return from_pmfs(pmfs, offsets, precision)


def gaussian_pmf(values: np.ndarray, scale: float) -> np.ndarray:
    """P(round(N(0, scale²)) = value), accurate in both tails, float64 like `values`."""
    # By symmetry on the negative side only: there the difference of two CDFs loses no digits.
    centre = -np.abs(np.asarray(values, np.float64))
    upper, lower = (_normal_cdf((centre + shift) / scale) for shift in (0.5, -0.5))
    return upper - lower


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    return 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2.0))


def _frozen_int32(values, name: str, rank: int = 1) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != rank or not np.issubdtype(values.dtype, np.integer):
        raise IcmError(
            f"{name} must be a rank-{rank} integer array, not {values.dtype} {values.shape}"
        )
    copy = values.astype(np.int32)
    if not np.array_equal(copy, values):
        raise IcmError(f"{name} must fit 32 bits; it spans {values.min()} to {values.max()}")
    copy.setflags(write=False)
    return copy
