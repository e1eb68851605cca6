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

from icm_jax.coding.tables import LOOKUP_BITS, Tables
from icm_jax.compiled import compiled
from icm_jax.errors import IcmError

_GAMMA_LIMIT = 1 << 30  # from here on the official ops never return

_OK, _NO_ESCAPE, _TOO_FAR, _BAD_STREAM, _NO_ROOM = range(5)
_REASONS = {
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
    return _coder(coder)[0](symbols, indexes, tables)


def decode(data: bytes, indexes: np.ndarray, tables: Tables, coder: str = "native") -> np.ndarray:
    """The inverse of `encode`: int32 [n] for the `indexes` int32 [n] that were used to encode.

    Raises:
      IcmError: `data` is not what `encode` can have written with these indexes and tables. The
        check is the format's own and weak; streams carry a checksum besides.
    """
    indexes = _int32_vector(indexes, "indexes")
    _check_rows(indexes, tables)
    return _coder(coder)[1](bytes(data), indexes, tables)


def _encode_native(symbols: np.ndarray, indexes: np.ndarray, tables: Tables) -> bytes:
    room, stop = 2 * len(symbols) + 2, np.empty(1, np.int64)
    while True:
        out = np.empty(room, np.uint8)
        status, end = _encode_loop(symbols, indexes, tables.cdf, tables.rows, out, stop)
        if status == _OK:
            return out[:end].tobytes()
        if status != _NO_ROOM:
            raise IcmError(f"cannot encode: {_REASONS[status]}")
        room = 4 * room + 256  # many escapes, of up to 126 bytes each: from the start again


def _decode_native(data: bytes, indexes: np.ndarray, tables: Tables) -> np.ndarray:
    status, symbols = _decode_loop(
        np.frombuffer(data, np.uint8), indexes, tables.cdf, tables.rows, tables.lookup
    )
    if status != _OK:
        raise IcmError(f"cannot decode: {_REASONS[status]}")
    return symbols


# The official ops trust their input: an escape of 2^30 or more, and a damaged stream, keep them
# busy for ever. So the native coder, which is bounded, looks at everything first.


def _encode_tfc(symbols: np.ndarray, indexes: np.ndarray, tables: Tables) -> bytes:
    ops = _tfc_ops()
    _encode_native(symbols, indexes, tables)
    values = symbols.astype(np.int64) - tables.offsets[indexes]
    handle = ops.create_range_encoder([], tables.cdf)
    handle = ops.entropy_encode_index(handle, indexes, values.astype(np.int32))
    return ops.entropy_encode_finalize(handle).numpy()


def _decode_tfc(data: bytes, indexes: np.ndarray, tables: Tables) -> np.ndarray:
    ops = _tfc_ops()
    _decode_native(data, indexes, tables)
    handle = ops.create_range_decoder(data, tables.cdf)
    handle, values = ops.entropy_decode_index(handle, indexes, [len(indexes)], np.int32)
    if not ops.entropy_decode_finalize(handle).numpy():
        raise IcmError(f"cannot decode: {_REASONS[_BAD_STREAM]}")
    return (values.numpy() + tables.offsets[indexes].astype(np.int64)).astype(np.int32)


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
    view = np.ascontiguousarray(values).view()
    view.flags.writeable = False  # one array type for Numba, hence one compilation
    return view


def _check_rows(indexes: np.ndarray, tables: Tables) -> None:
    # Without a sign, numbers below zero are large: one pass instead of two.
    if len(indexes) and indexes.view(np.uint32).max() >= len(tables.rows):
        raise IcmError(
            f"table indexes {indexes.min()} to {indexes.max()} are outside the tables' "
            f"{len(tables.rows)} rows"
        )


# Two rules of Numba shape what follows. uint64 with int64 makes float64: whatever meets the state
# is uint64. An array handed to a function costs two atomic counts: only rare branches do that.
_0, _1, _8, _16, _24 = (np.uint64(value) for value in (0, 1, 8, 16, 24))
_LOOKUP = np.uint64(LOOKUP_BITS)
_ONE = np.uint32(1)
_FULL = np.uint64((1 << 32) - 1)
_LOW = np.uint64((1 << 16) - 1)


@compiled
def _narrow(base, last, low, high, precision):
    """The part [low, high) / 2^precision of the interval; its base may have passed 2^32."""
    size = last + _1
    start = (size * low) >> precision
    return base + start, ((size * high) >> precision) - _1 - start


@compiled
def _encode_loop(symbols, indexes, cdf, rows, out, stop):
    """(status, how many bytes of `out` are written)."""
    # Nothing is allocated here, and no part of an array taken: it takes seconds to compile that.
    base, last, end, n = _0, _FULL, 0, 0
    # Numbers without a sign spare instructions; differences go modulo 2^32.
    bare = symbols.view(np.uint32), indexes.view(np.uint32), cdf.view(np.uint32)
    plain = rows.view(np.uint32)
    while True:
        base, last, end = _encode_plain(*bare, plain, base, last, out, end, n, stop)
        n = stop[0]
        if n == len(symbols):
            return _OK, _finish(base, last, out, end)
        row = rows[indexes[n]]
        value = np.int64(symbols[n]) - row[3]
        gamma = -value if value < 0 else value - row[1] + 1
        if not row[4]:
            return _NO_ESCAPE, end
        if gamma >= _GAMMA_LIMIT:
            return _TOO_FAR, end
        # Each act of coding sends at most two bytes out; an escape has two for every digit.
        if end + 2 * (len(symbols) - n) + 4 * _digits(gamma) + 2 > len(out):
            return _NO_ROOM, end
        base, last, end = _put_escape(base, last, out, end, gamma, value < 0, cdf, row)
        n += 1


@compiled
def _encode_plain(symbols, indexes, cdf, rows, base, last, out, end, begin, stop):
    """Codes from `begin` to the first symbol outside its row; its place goes to `stop`.

    Stored, not returned: a loop that must know at its end where it stopped is a tenth slower.
    """
    stop[0] = len(symbols)
    for n in range(begin, len(symbols)):
        row = indexes[n]
        value = np.uint32(symbols[n] - rows[row, 3])
        if value >= rows[row, 1]:
            stop[0] = n
            break
        at = rows[row, 0] + value
        low, high = np.uint64(cdf[at]), np.uint64(cdf[at + _ONE])
        base, last = _narrow(base, last, low, high, np.uint64(rows[row, 2]))
        if last <= _LOW:  # as `_put_shift`, which would cost its two counts too often here
            if base > _FULL:
                base &= _FULL
                _carry(out, end)
            out[end] = base >> _24
            out[end + 1] = base >> _16
            end += 2
            base = (base << _16) & _FULL
            last = (last << _16) | _LOW
    return base, last, end


@compiled
def _put_shift(base, last, out, end):
    # What passed 2^32 since the last shift: at most one carry, for the interval only shrinks.
    if base > _FULL:
        base &= _FULL
        _carry(out, end)
    out[end] = base >> _24
    out[end + 1] = base >> _16
    return (base << _16) & _FULL, (last << _16) | _LOW, end + 2


@compiled
def _put_escape(base, last, out, end, gamma, negative, cdf, row):
    """The row's escape symbol, then zeros, digits and sign of `gamma`, each at probability 1/2."""
    at = row[0] + row[1]
    low, high, bits = np.uint64(cdf[at]), np.uint64(cdf[at + 1]), np.uint64(row[2])
    left = 2 * _digits(gamma)  # zeros, digits and sign, read as one number
    while True:
        base, last = _narrow(base, last, low, high, bits)
        if last <= _LOW:
            base, last, end = _put_shift(base, last, out, end)
        if left == 0:
            return base, last, end
        left -= 1
        low = np.uint64((2 * gamma + negative) >> left) & _1
        high, bits = low + _1, _1


@compiled
def _digits(gamma):
    digits = 0
    while gamma > 0:
        gamma >>= 1
        digits += 1
    return digits


@compiled
def _carry(out, end):
    # Never runs past the front: the interval began below 2^32 and only shrinks.
    at = end - 1
    while out[at] == 0xFF:
        out[at] = 0
        at -= 1
    out[at] += np.uint8(1)


@compiled
def _finish(base, last, out, end):
    """Writes the roundest number of the interval, and says how many bytes are out."""
    if base > _FULL:
        base &= _FULL
        _carry(out, end)
    if base + last > _FULL:  # 2^32 itself lies inside: a carry and then zeros
        _carry(out, end)
        while out[end - 1] == 0:
            end -= 1
    elif base != _0:
        value = ((base - _1) >> _24) + _1
        if value <= (base + last) >> _24:
            out[end] = value
            return end + 1
        value = ((base - _1) >> _16) + _1
        out[end], out[end + 1] = value >> _8, value & np.uint64(0xFF)
        end += 2 if out[end + 1] else 1
    return end


@compiled
def _decode_loop(data, indexes, cdf, rows, lookup):
    symbols = np.empty(len(indexes), np.int32)
    base, last, at = _0, _FULL, 4
    within = _two_bytes(data, 0) << _16 | _two_bytes(data, 2)  # the word read, less base
    bare, plain = cdf.view(np.uint32), rows.view(np.uint32)
    for n in range(len(indexes)):
        row = np.uint32(indexes[n])
        bits = np.uint64(plain[row, 2])
        target = _target(within, last, bits)
        bucket = (target - _1) >> (bits - _LOOKUP if bits > _LOOKUP else _0)
        place = plain[row, 0] + np.uint32(lookup[row, bucket])
        low, high = np.uint64(bare[place]), np.uint64(bare[place + _ONE])
        while high < target:
            place += _ONE
            low, high = high, np.uint64(bare[place + _ONE])
        start, last = _narrow(_0, last, low, high, bits)
        base, within = (base + start) & _FULL, within - start
        if last <= _LOW:
            base, last, within, at = _shift(base, last, within, at, data)
        count, offset = np.int64(rows[row, 1]), np.int64(rows[row, 3])
        value = np.int64(place - plain[row, 0])
        if value == count:  # only rows with an escape have this symbol
            gamma, negative, base, last, within, at = _take_escape(base, last, within, at, data)
            if gamma == 0:
                return _BAD_STREAM, symbols
            value = -gamma if negative else gamma + count - 1
            if value + offset != np.int32(value + offset):
                return _BAD_STREAM, symbols
        symbols[n] = value + offset
    word = (base + within) & _FULL
    return (_OK if _ends_well(base, last, word, at, len(data)) else _BAD_STREAM), symbols


@compiled
def _two_bytes(data, at):
    # Trailing zeros are not written.
    word = np.uint64(data[at]) << _8 if at < len(data) else _0
    return word | np.uint64(data[at + 1]) if at + 1 < len(data) else word


@compiled
def _target(within, last, precision):
    """The least c with size * c > within * 2^precision: the symbol's CDF reaches it."""
    return (((within + _1) << precision) + last) // (last + _1)


@compiled
def _shift(base, last, within, at, data):
    within = (within << _16) | _two_bytes(data, at)
    return (base << _16) & _FULL, (last << _16) | _LOW, within, at + 2


@compiled
def _take_escape(base, last, within, at, data):
    """The gamma and the sign of an escape, and the state; gamma is 0 in a damaged stream."""
    zeros, gamma, left = 0, 0, -1  # left: digits and sign still to come, once they are known
    while left != 0:
        bit = _0 if _target(within, last, _1) == _1 else _1
        start, last = _narrow(_0, last, bit, bit + _1, _1)
        base, within = (base + start) & _FULL, within - start
        if last <= _LOW:
            base, last, within, at = _shift(base, last, within, at, data)
        if left > 0:
            left -= 1
        elif bit == _1:
            left = zeros + 1
        else:
            zeros += 1
            if 2 << zeros > _GAMMA_LIMIT:
                return 0, 0, base, last, within, at
        gamma = gamma << 1 | np.int64(bit)
    return gamma >> 1, gamma & 1, base, last, within, at


@compiled
def _ends_well(base, last, word, at, length):
    """The format's own end check: all bytes read, and the word is the one `_finish` chose."""
    if at < length:
        return False
    if base == _0 or base + last > _FULL:
        return word == _0
    before = base - _1
    shift = _24 if before >> _24 < (base + last) >> _24 else _16
    return word == ((before >> shift) + _1) << shift
