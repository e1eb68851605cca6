"""The range coder: integers and table rows to a byte string and back.

`coder="native"` runs anywhere (Numba, no TensorFlow); `coder="tfc"` calls the official
tensorflow-compression ops. Both write the same bytes (the rules of that library's C++ coder).

    state   base and size - 1, 32 bits each: the interval [base, base + size) still open
    symbol  its row's [cdf[k], cdf[k + 1]) / 2^p narrows the interval, rounding down
    shift   when size <= 2^16 the two top bytes of base leave, and 16 bits come in below
    carry   base + start over 2^32 adds one to the bytes already out
    end     the roundest number of the interval; trailing zeros are implicit

An integer outside its row is coded as the row's escape symbol, an Elias-gamma code of the distance
and a sign, every bit of it at probability 1/2.
"""

from collections.abc import Callable

import numpy as np

from icm_jax.coding.tables import Tables
from icm_jax.compiled import native
from icm_jax.errors import IcmError

GAMMA_LIMIT = 1 << 30
"""Of the distance in an escape; from here on the official ops never return."""
OK, NO_ESCAPE, TOO_FAR, BAD_STREAM, NO_ROOM = range(5)
"""What the loops say, see `icm_jax.coding.range_loops`."""
_LOOPS = "icm_jax.coding.range_loops"
_REASONS = {
    NO_ESCAPE: "a value lies outside its table row, and that row has no escape symbol",
    TOO_FAR: "a value lies 2^30 or more outside its table row",
    BAD_STREAM: "the stream is truncated, altered or was written with other tables",
}


def encode(
    symbols: np.ndarray, indexes: np.ndarray, tables: Tables, coder: str = "native"
) -> bytes:
    """Codes `symbols` in order, each with the table row that `indexes` names.

    Args:
      symbols: int32 [n], the integers themselves (the row's offset is subtracted here).
      indexes: int32 [n], table rows, 0 <= index < R.
      tables: the frozen tables.
      coder: "native" or "tfc"; the bytes are the same.

    Returns: the byte string; empty for n = 0.

    Raises:
      IcmError: wrong dtype, shape or index, or a value that the rows cannot code.

    >>> from icm_jax.coding.tables import Tables
    >>> tables = Tables(np.array([-12, 0, 16, 4064, 4080, 4096]), np.array([0]))
    >>> symbols = np.array([0, 1, 2, 3, -1, 7, 1], np.int32)
    >>> encode(symbols, np.zeros(7, np.int32), tables).hex()
    '00fd02c0bff2a9'
    """
    symbols, indexes = _int32_vector(symbols, "symbols"), _int32_vector(indexes, "indexes")
    if symbols.shape != indexes.shape:
        raise IcmError(f"{len(symbols)} symbols but {len(indexes)} table indexes")
    _check_rows(indexes, tables)
    return _coder(coder)[0](symbols, indexes, tables)


def decode(data: bytes, indexes: np.ndarray, tables: Tables, coder: str = "native") -> np.ndarray:
    """The inverse of `encode`: int32 [n] for the `indexes` int32 [n] that were used to encode.

    Raises:
      IcmError: `data` is not what `encode` can have written with these indexes and tables. The
        check is the format's own and weak; streams carry a checksum besides.
    """
    return Decoder(data, tables, coder).take(indexes, ends=True)


class Decoder:
    """A byte string in parts, where the rows of the later symbols depend on the earlier ones.

    >>> from icm_jax.coding.tables import Tables
    >>> tables = Tables(np.array([-12, 0, 16, 4064, 4080, 4096]), np.array([0]))
    >>> decoder = Decoder(bytes.fromhex("00fd02c0bff2a9"), tables)
    >>> decoder.take(np.zeros(5, np.int32)).tolist()
    [0, 1, 2, 3, -1]
    >>> decoder.take(np.zeros(2, np.int32), ends=True).tolist()
    [7, 1]
    """

    def __init__(self, data: bytes, tables: Tables, coder: str = "native"):
        self._tables = tables
        self._part = _coder(coder)[1](bytes(data), tables)

    def take(self, indexes: np.ndarray, *, ends: bool = False) -> np.ndarray:
        """The next symbols, int32 [n], of table rows int32 [n]; after the last, all has to be read.

        Raises: IcmError as `decode`.
        """
        indexes = _int32_vector(indexes, "indexes")
        _check_rows(indexes, self._tables)
        return self._part(indexes, ends)


def _encode_native(symbols: np.ndarray, indexes: np.ndarray, tables: Tables) -> bytes:
    loop, room, stop = native(_LOOPS, "encode"), 2 * len(symbols) + 2, np.empty(1, np.int64)
    while True:
        out = np.empty(room, np.uint8)
        status = loop(symbols, indexes, len(symbols), tables.cdf, tables.rows, out, room, stop)
        if status == OK:
            return out[: stop[0]].tobytes()
        if status != NO_ROOM:
            raise IcmError(f"cannot encode: {_REASONS[status]}")
        room = 4 * room + 256  # many escapes, of up to 126 bytes each: from the start again


_Part = Callable[[np.ndarray, bool], np.ndarray]
"""(table rows int32 [n], whether they are the last) -> the next symbols int32 [n]."""


def _decoder_native(data: bytes, tables: Tables) -> _Part:
    loop, stored, state = native(_LOOPS, "decode"), np.frombuffer(data, np.uint8), np.zeros(4, "u8")
    fixed = tables.cdf, tables.rows, tables.lookup

    def part(indexes, ends):
        symbols = np.empty(len(indexes), np.int32)
        given = stored, len(stored), indexes, len(indexes), *fixed, symbols, state, int(ends)
        status = loop(*given)
        if status != OK:
            raise IcmError(f"cannot decode: {_REASONS[status]}")
        return symbols

    return part


# The official ops trust their input: an escape of 2^30 or more, and a damaged stream, keep them
# busy for ever. So the native coder, which is bounded, looks at everything first.


def _encode_tfc(symbols: np.ndarray, indexes: np.ndarray, tables: Tables) -> bytes:
    ops = _tfc_ops()
    _encode_native(symbols, indexes, tables)
    values = symbols.astype(np.int64) - tables.offsets[indexes]
    handle = ops.create_range_encoder([], tables.cdf)
    handle = ops.entropy_encode_index(handle, indexes, values.astype(np.int32))
    return ops.entropy_encode_finalize(handle).numpy()


def _decoder_tfc(data: bytes, tables: Tables) -> _Part:
    ops, first = _tfc_ops(), _decoder_native(data, tables)
    handle = ops.create_range_decoder(data, tables.cdf)

    def part(indexes, ends):
        nonlocal handle
        first(indexes, ends)
        handle, values = ops.entropy_decode_index(handle, indexes, [len(indexes)], np.int32)
        if ends and not ops.entropy_decode_finalize(handle).numpy():
            raise IcmError(f"cannot decode: {_REASONS[BAD_STREAM]}")
        return (values.numpy() + tables.offsets[indexes].astype(np.int64)).astype(np.int32)

    return part


def _tfc_ops():
    try:
        import tensorflow_compression_ops  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise IcmError(
            'coder="tfc" needs the official ops: pip install "icm_jax[tfc]"; '
            'coder="native" writes the same bytes without them'
        ) from error
    return tensorflow_compression_ops


_CODERS: dict[str, tuple[Callable, Callable]] = {
    "native": (_encode_native, _decoder_native),
    "tfc": (_encode_tfc, _decoder_tfc),
}


def _coder(name: str) -> tuple[Callable, Callable]:
    if name not in _CODERS:
        raise IcmError(f"unknown coder {name!r}; choose one of {', '.join(_CODERS)}")
    return _CODERS[name]


def _int32_vector(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype != np.int32:
        raise IcmError(f"{name} must be int32 of rank 1, not {values.dtype} {values.shape}")
    return np.ascontiguousarray(values)


def _check_rows(indexes: np.ndarray, tables: Tables) -> None:
    # Without a sign, numbers below zero are large: one pass instead of two.
    if len(indexes) and indexes.view(np.uint32).max() >= len(tables.rows):
        raise IcmError(
            f"table indexes {indexes.min()} to {indexes.max()} are outside the tables' "
            f"{len(tables.rows)} rows"
        )
