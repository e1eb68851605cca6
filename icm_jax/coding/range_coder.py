"""The range coder: integers and table rows to a byte string and back.

`coder="native"` runs anywhere (Numba, no TensorFlow); `coder="tfc"` calls the official
tensorflow-compression ops. Both write the same bytes (state machine: papers.md 7.3).

An integer outside its row is coded as the row's escape symbol, an Elias-gamma code of the distance
and a sign, every bit of it at probability 1/2.
"""

from collections.abc import Callable

import numba
import numpy as np

from icm_jax.coding.tables import Tables
from icm_jax.errors import IcmError

_MASK = 0xFFFFFFFF
_GAMMA_LIMIT = 1 << 30  # from here on the official ops end the process (signed overflow)

_OK, _BAD_ROW, _NO_ESCAPE, _TOO_FAR, _BAD_STREAM = range(5)
_REASONS = {
    _BAD_ROW: "a table index is outside the tables",
    _NO_ESCAPE: "a value lies outside its table row, and that row has no escape symbol",
    _TOO_FAR: "a value lies 2^30 or more outside its table row",
    _BAD_STREAM: "the stream is truncated, altered or was written with other tables",
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
    values = symbols.astype(np.int64) - tables.offsets[indexes].astype(np.int64)
    return _coder(coder)[0](values, indexes, tables)


def decode(data: bytes, indexes: np.ndarray, tables: Tables, coder: str = "native") -> np.ndarray:
    """The inverse of `encode`: int32 [n] for the `indexes` int32 [n] that were used to encode.

    Raises:
      IcmError: `data` is not what `encode` can have written with these indexes and tables. The
        check is the format's own and weak; streams carry a checksum besides.
    """
    indexes = _int32_vector(indexes, "indexes")
    _check_rows(indexes, tables)
    values = _coder(coder)[1](bytes(data), indexes, tables)
    symbols = values.astype(np.int64) + tables.offsets[indexes].astype(np.int64)
    if len(symbols) and not (-(2**31) <= symbols.min() and symbols.max() < 2**31):
        raise IcmError(f"cannot decode: {_REASONS[_BAD_STREAM]}")
    return symbols.astype(np.int32)


def _encode_native(values: np.ndarray, indexes: np.ndarray, tables: Tables) -> bytes:
    status, data = _encode_loop(values, indexes, tables.cdf, tables.starts, tables.lengths)
    if status != _OK:
        raise IcmError(f"cannot encode: {_REASONS[status]}")
    return data.tobytes()


def _decode_native(data: bytes, indexes: np.ndarray, tables: Tables) -> np.ndarray:
    status, values = _decode_loop(
        np.frombuffer(data, np.uint8), indexes, tables.cdf, tables.starts, tables.lengths
    )
    if status != _OK:
        raise IcmError(f"cannot decode: {_REASONS[status]}")
    return values


def _encode_tfc(values: np.ndarray, indexes: np.ndarray, tables: Tables) -> bytes:
    # The op trusts its input (an Elias-gamma code over 30 bits ends the process): check it here.
    escape = tables.cdf[tables.starts] < 0
    top = (tables.lengths - escape)[indexes]
    outside = (values < 0) | (values >= top)
    if (outside & ~escape[indexes]).any():
        raise IcmError(f"cannot encode: {_REASONS[_NO_ESCAPE]}")
    if (np.where(values < 0, -values, values - top + 1) >= _GAMMA_LIMIT).any():
        raise IcmError(f"cannot encode: {_REASONS[_TOO_FAR]}")
    ops = _tfc_ops()
    handle = ops.create_range_encoder([], tables.cdf)
    handle = ops.entropy_encode_index(handle, indexes, values.astype(np.int32))
    return ops.entropy_encode_finalize(handle).numpy()


def _decode_tfc(data: bytes, indexes: np.ndarray, tables: Tables) -> np.ndarray:
    ops = _tfc_ops()
    handle = ops.create_range_decoder(data, tables.cdf)
    handle, values = ops.entropy_decode_index(handle, indexes, [len(indexes)], np.int32)
    if not ops.entropy_decode_finalize(handle).numpy():
        raise IcmError(f"cannot decode: {_REASONS[_BAD_STREAM]}")
    return values.numpy()


def _tfc_ops():
    try:
        import tensorflow_compression_ops
    except ImportError as error:
        raise IcmError(
            'coder="tfc" needs the official ops: pip install "icm_jax[tfc]"; '
            'coder="native" writes the same bytes without them'
        ) from error
    return tensorflow_compression_ops


_CODERS: dict[str, tuple[Callable, Callable]] = {
    "native": (_encode_native, _decode_native),
    "tfc": (_encode_tfc, _decode_tfc),
}


def _coder(name: str) -> tuple[Callable, Callable]:
    if name not in _CODERS:
        raise IcmError(f"unknown coder {name!r}; choose one of {', '.join(_CODERS)}")
    return _CODERS[name]


def _int32_vector(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype != np.int32:
        raise IcmError(f"{name} must be int32 of rank 1, not {values.dtype} {values.shape}")
    return values


def _check_rows(indexes: np.ndarray, tables: Tables) -> None:
    if len(indexes) and not (0 <= indexes.min() and indexes.max() < len(tables.starts)):
        raise IcmError(
            f"table indexes {indexes.min()} to {indexes.max()} are outside the tables' "
            f"{len(tables.starts)} rows"
        )


@numba.njit(cache=True)
def _gamma_bits(value):
    """Number of binary digits of `value` >= 1."""
    bits = 0
    while value > 0:
        value >>= 1
        bits += 1
    return bits


@numba.njit(cache=True)
def _put(state, low, high, precision, out):
    """Narrows the interval to [low, high) / 2^precision. state: base, size-1, carry, zeros, end."""
    base, last, carry, zeros, end = state
    size = last + np.uint64(1)
    start = (size * low) >> precision
    last = ((size * high) >> precision) - np.uint64(1) - start
    base = (base + start) & np.uint64(_MASK)
    overflowed = base < start
    if base + last > np.uint64(_MASK):  # a carry may still come: hold the bytes back
        if last < np.uint64(1 << 16):
            base = (base << np.uint64(16)) & np.uint64(_MASK)
            last = (last << np.uint64(16)) | np.uint64(0xFFFF)
            zeros += 2
        return base, last, carry, zeros, end
    if carry >= 0:
        word, fill = (carry, 0) if overflowed else (carry - 1, 0xFF)
        out[end] = word >> 8
        out[end + 1] = word & 0xFF
        out[end + 2 : end + 2 + zeros] = fill
        end += 2 + zeros
        carry, zeros = -1, 0
    if last < np.uint64(1 << 16):
        top = np.int64(base >> np.uint64(16))
        base = (base << np.uint64(16)) & np.uint64(_MASK)
        last = (last << np.uint64(16)) | np.uint64(0xFFFF)
        if base + last <= np.uint64(_MASK):
            out[end] = top >> 8
            out[end + 1] = top & 0xFF
            end += 2
        else:
            carry = top + 1
    return base, last, carry, zeros, end


@numba.njit(cache=True)
def _finish(state, out):
    base, last, carry, _, end = state
    if carry >= 0:
        out[end] = carry >> 8
        end += 1
        if carry & 0xFF:
            out[end] = carry & 0xFF
            end += 1
    elif base != 0:
        byte = ((base - np.uint64(1)) >> np.uint64(24)) + np.uint64(1)
        if byte <= (base + last) >> np.uint64(24):
            out[end] = byte
            end += 1
        else:
            word = ((base - np.uint64(1)) >> np.uint64(16)) + np.uint64(1)
            out[end] = word >> np.uint64(8)
            end += 1
            if word & np.uint64(0xFF):
                out[end] = word & np.uint64(0xFF)
                end += 1
    return end


@numba.njit(cache=True)
def _encode_loop(values, indexes, cdf, starts, lengths):
    # Each coding act moves at most 16 bits out, so the number of acts bounds the bytes.
    acts = 0
    for n in range(len(values)):
        row = starts[indexes[n]]
        ordinary = lengths[indexes[n]] - (1 if cdf[row] < 0 else 0)
        acts += 1
        if values[n] < 0 or values[n] >= ordinary:
            if cdf[row] > 0:
                return _NO_ESCAPE, np.zeros(0, np.uint8)
            gamma = -values[n] if values[n] < 0 else values[n] - ordinary + 1
            if gamma >= _GAMMA_LIMIT:
                return _TOO_FAR, np.zeros(0, np.uint8)
            acts += 2 * _gamma_bits(gamma)
    out = np.zeros(2 * acts + 8, np.uint8)
    state = (np.uint64(0), np.uint64(_MASK), np.int64(-1), np.int64(0), np.int64(0))
    one = np.uint64(1)
    for n in range(len(values)):
        row = starts[indexes[n]]
        escapes = cdf[row] < 0
        precision = np.uint64(abs(cdf[row]))
        ordinary = lengths[indexes[n]] - (1 if escapes else 0)
        value = values[n]
        symbol = value if 0 <= value < ordinary else np.int64(ordinary)
        low, high = np.uint64(cdf[row + 1 + symbol]), np.uint64(cdf[row + 2 + symbol])
        state = _put(state, low, high, precision, out)
        if escapes and symbol == ordinary:
            gamma = -value if value < 0 else value - ordinary + 1
            bits = _gamma_bits(gamma)
            for _ in range(bits - 1):
                state = _put(state, np.uint64(0), one, one, out)
            for shift in range(bits - 1, -1, -1):
                bit = np.uint64((gamma >> shift) & 1)
                state = _put(state, bit, bit + one, one, out)
            sign = one if value < 0 else np.uint64(0)
            state = _put(state, sign, sign + one, one, out)
    end = _finish(state, out)
    return _OK, out[:end]


@numba.njit(cache=True)
def _get(state, cdf, first, count, precision, data):
    """Next symbol of the row whose CDF is cdf[first : first + count + 1]."""
    base, last, value, at = state
    size = last + np.uint64(1)
    offset = (((value - base) & np.uint64(_MASK)) + np.uint64(1)) << precision
    target = (offset + last) // size  # the least c with size * c >= offset
    below, above = np.int64(0), np.int64(count)
    while above - below > 1:
        middle = (below + above) >> 1
        if np.uint64(cdf[first + middle]) >= target:
            above = middle
        else:
            below = middle
    start = (size * np.uint64(cdf[first + below])) >> precision
    last = ((size * np.uint64(cdf[first + above])) >> precision) - np.uint64(1) - start
    base = (base + start) & np.uint64(_MASK)
    if last < np.uint64(1 << 16):
        base = (base << np.uint64(16)) & np.uint64(_MASK)
        last = (last << np.uint64(16)) | np.uint64(0xFFFF)
        value = (value << np.uint64(16)) & np.uint64(_MASK)
        value |= _byte(data, at) << np.uint64(8) | _byte(data, at + 1)
        at += 2
    return below, (base, last, value, at)


@numba.njit(cache=True)
def _byte(data, at):
    # Trailing zeros are not written.
    return np.uint64(data[at]) if at < len(data) else np.uint64(0)


@numba.njit(cache=True)
def _decode_loop(data, indexes, cdf, starts, lengths):
    values = np.zeros(len(indexes), np.int32)
    half = np.array([0, 1, 2], np.int32)
    one = np.uint64(1)
    value = np.uint64(0)
    for at in range(4):
        value = value << np.uint64(8) | _byte(data, at)
    state = (np.uint64(0), np.uint64(_MASK), value, np.int64(4))
    for n in range(len(indexes)):
        row = starts[indexes[n]]
        length = lengths[indexes[n]]
        symbol, state = _get(state, cdf, row + 1, length, np.uint64(abs(cdf[row])), data)
        if cdf[row] < 0 and symbol == length - 1:
            bits = 0
            bit, state = _get(state, half, 0, 2, one, data)
            while bit == 0:
                bits += 1
                if bits > 29:
                    return _BAD_STREAM, values
                bit, state = _get(state, half, 0, 2, one, data)
            gamma = np.int64(1)
            for _ in range(bits):
                bit, state = _get(state, half, 0, 2, one, data)
                gamma = gamma << 1 | bit
            sign, state = _get(state, half, 0, 2, one, data)
            symbol = -gamma if sign else gamma + length - 2
            if symbol > 0x7FFFFFFF:
                return _BAD_STREAM, values
        values[n] = symbol
    return (_OK if _ends_well(state, len(data)) else _BAD_STREAM), values


@numba.njit(cache=True)
def _ends_well(state, length):
    """The format's own end check: all bytes read, and the value is the one `_finish` chose."""
    base, last, value, at = state
    if at < length:
        return False
    if base == 0 or base + last > np.uint64(_MASK):
        return value == 0
    previous = base - np.uint64(1)
    shift = np.uint64(24)
    if not (previous >> shift) < ((base + last) >> shift):
        shift = np.uint64(16)
    return value == ((previous >> shift) + np.uint64(1)) << shift
