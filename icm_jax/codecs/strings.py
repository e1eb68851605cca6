"""A segment's symbols as the strings of its layer: one per pass, or one for all waves of a latent
whose prior is `Causal`, through which the range coder goes on from wave to wave.

Both classes are what `walk.in_passes` asks for symbols; their CRC is over those of a layer.
"""

import zlib
from collections.abc import Iterator

import numpy as np

from icm_jax.codecs.codec import Causal, Segment
from icm_jax.coding import range_coder
from icm_jax.coding.tables import Tables
from icm_jax.errors import IcmError


class Writer:
    """Attributes: crc: of the layer's symbols, from that of those before on."""

    def __init__(self, segment: Segment, latent: np.ndarray, crc: int):
        self.crc = crc
        self._segment, self._latent = segment, latent
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []  # symbols, rows

    def __call__(self, chosen, rows: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """The symbols of a pass or wave. Raises: IcmError if they are not finite or too large."""
        with np.errstate(invalid="ignore"):
            symbols = np.rint(self._latent[chosen].ravel() - mean)
        if not np.isfinite(symbols).all() or np.abs(symbols).max(initial=0) > 2**29:
            name = self._segment.name
            raise IcmError(f"latent {name!r} is not finite or too large; retrain")
        symbols = symbols.astype(np.int32)
        self._parts.append((symbols, rows))
        self.crc = _crc(symbols, self.crc)
        return symbols

    def strings(self, tables: Tables, coder: str) -> list[bytes]:
        """Of all symbols so far."""
        parts = self._parts
        if isinstance(self._segment.prior, Causal):
            symbols, rows = zip(*parts, strict=True)
            parts = [(np.concatenate(symbols), np.concatenate(rows))]
        return [range_coder.encode(symbols, rows, tables, coder) for symbols, rows in parts]


class Reader:
    """Attributes: crc: of the layer's symbols, from that of those before on."""

    def __init__(
        self, segment: Segment, strings: Iterator[bytes], tables: Tables, coder: str, crc: int
    ):
        self.crc = crc
        self._strings, self._tables, self._coder = strings, tables, coder
        self._joined = self._decoder() if isinstance(segment.prior, Causal) else None

    def _decoder(self) -> range_coder.Decoder:
        return range_coder.Decoder(next(self._strings), self._tables, self._coder)

    def __call__(self, chosen, rows: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """The symbols of the next pass or wave. Raises: IcmError as `range_coder.decode`."""
        del chosen, mean
        if self._joined:
            symbols = self._joined.take(rows)
        else:
            symbols = self._decoder().take(rows, ends=True)
        self.crc = _crc(symbols, self.crc)
        return symbols

    def end(self) -> None:
        """After the last. Raises: IcmError if a string of several waves is not read to its end."""
        if self._joined:
            self._joined.take(np.zeros(0, np.int32), ends=True)


def _crc(symbols: np.ndarray, before: int) -> int:
    return zlib.crc32(symbols.astype("<i4").tobytes(), before)
