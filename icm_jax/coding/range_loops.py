"""The loops of the range coder, as Numba compiles them.

`icm_jax.coding.range_coder` says what they do; it loads their machine code without this module, see
`icm_jax.compiled.native`.
"""

import numpy as np

from icm_jax.coding.range_coder import BAD_STREAM, GAMMA_LIMIT, NO_ESCAPE, NO_ROOM, OK, TOO_FAR
from icm_jax.coding.tables import LOOKUP_BITS
from icm_jax.compiled import entry, inlined

# uint64 with int64 makes float64 in Numba: whatever meets the state is uint64. Arrays are addresses
# here: an array handed to a function would cost two atomic counts, and half of the code would be
# about errors that cannot be.
_0, _1, _8, _16, _24 = (np.uint64(value) for value in (0, 1, 8, 16, 24))
_LOOKUP = np.uint64(LOOKUP_BITS)
_ONE, _ROW = np.uint32(1), np.uint32(5)
_LENGTH, _BITS, _OFFSET, _ESCAPE = (np.uint32(column) for column in range(1, 5))  # `Tables.rows`
_FULL = np.uint64((1 << 32) - 1)
_LOW = np.uint64((1 << 16) - 1)
# Numbers without a sign spare instructions; differences go modulo 2^32.
_U8, _U16, _U32, _U64, _I32, _I64 = (
    f"CPointer({name})" for name in ("uint8", "uint16", "uint32", "uint64", "int32", "int64")
)


@inlined
def _narrow(base, last, low, high, precision):
    """The part [low, high) / 2^precision of the interval; its base may have passed 2^32."""
    size = last + _1
    start = (size * low) >> precision
    return base + start, ((size * high) >> precision) - _1 - start


@inlined
def _encode_plain(symbols, indexes, count, cdf, rows, base, last, out, end, begin, stop):
    """Codes from `begin` to the first symbol outside its row; its place goes to `stop`.

    Stored, not returned: a loop that must know at its end where it stopped is a tenth slower.
    """
    stop[0] = count
    for n in range(begin, count):
        row = indexes[n] * _ROW
        value = np.uint32(symbols[n] - rows[row + _OFFSET])
        if value >= rows[row + _LENGTH]:
            stop[0] = n
            break
        at = np.uint32(rows[row] + value)
        low, high = np.uint64(cdf[at]), np.uint64(cdf[at + _ONE])
        base, last = _narrow(base, last, low, high, np.uint64(rows[row + _BITS]))
        if last <= _LOW:
            base, last, end = _put_shift(base, last, out, end)
    return base, last, end


@inlined
def _put_shift(base, last, out, end):
    # What passed 2^32 since the last shift: at most one carry, for the interval only shrinks.
    if base > _FULL:
        base &= _FULL
        _carry(out, end)
    out[end] = base >> _24
    out[end + 1] = base >> _16
    return (base << _16) & _FULL, (last << _16) | _LOW, end + 2


@inlined
def _put_escape(base, last, out, end, gamma, negative, cdf, rows, row):
    """The row's escape symbol, then zeros, digits and sign of `gamma`, each at probability 1/2."""
    at = rows[row] + rows[row + _LENGTH]
    low, high, bits = np.uint64(cdf[at]), np.uint64(cdf[at + _ONE]), np.uint64(rows[row + _BITS])
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


@inlined
def _digits(gamma):
    digits = 0
    while gamma > 0:
        gamma >>= 1
        digits += 1
    return digits


@inlined
def _carry(out, end):
    # Never runs past the front: the interval began below 2^32 and only shrinks.
    at = end - 1
    while out[at] == 0xFF:
        out[at] = 0
        at -= 1
    out[at] += np.uint8(1)


@inlined
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


@inlined
def _two_bytes(data, size, at):
    # Trailing zeros are not written.
    word = np.uint64(data[at]) << _8 if at < size else _0
    return word | np.uint64(data[at + 1]) if at + 1 < size else word


@inlined
def _target(within, last, precision):
    """The least c with size * c > within * 2^precision: the symbol's CDF reaches it."""
    return (((within + _1) << precision) + last) // (last + _1)


@inlined
def _shift(base, last, within, at, data, size):
    within = (within << _16) | _two_bytes(data, size, at)
    return (base << _16) & _FULL, (last << _16) | _LOW, within, at + 2


@inlined
def _take_escape(base, last, within, at, data, size):
    """The gamma and the sign of an escape, and the state; gamma is 0 in a damaged stream."""
    zeros, gamma, left = 0, 0, -1  # left: digits and sign still to come, once they are known
    while left != 0:
        bit = _0 if _target(within, last, _1) == _1 else _1
        start, last = _narrow(_0, last, bit, bit + _1, _1)
        base, within = (base + start) & _FULL, within - start
        if last <= _LOW:
            base, last, within, at = _shift(base, last, within, at, data, size)
        if left > 0:
            left -= 1
        elif bit == _1:
            left = zeros + 1
        else:
            zeros += 1
            if 2 << zeros > GAMMA_LIMIT:
                return 0, 0, base, last, within, at
        gamma = gamma << 1 | np.int64(bit)
    return gamma >> 1, gamma & 1, base, last, within, at


@inlined
def _ends_well(base, last, word, at, length):
    """The format's own end check: all bytes read, and the word is the one `_finish` chose."""
    if at < length:
        return False
    if base == _0 or base + last > _FULL:
        return word == _0
    before = base - _1
    shift = _24 if before >> _24 < (base + last) >> _24 else _16
    return word == ((before >> shift) + _1) << shift


# Compiled when the module is read, and so below what they call.


@entry(f"int64({_U32}, {_U32}, int64, {_U32}, {_U32}, {_U8}, int64, {_I64})")
def encode(symbols, indexes, count, cdf, rows, out, room, stop):
    """Codes `count` symbols -> status; how many bytes of `room` are written goes to `stop`."""
    base, last, end, n = _0, _FULL, 0, 0
    while True:
        base, last, end = _encode_plain(
            symbols, indexes, count, cdf, rows, base, last, out, end, n, stop
        )
        n = stop[0]
        stop[0] = end
        if n == count:
            stop[0] = _finish(base, last, out, end)
            return OK
        row = indexes[n] * _ROW
        value = np.int64(np.int32(symbols[n])) - np.int64(np.int32(rows[row + _OFFSET]))
        gamma = -value if value < 0 else value - np.int64(rows[row + _LENGTH]) + 1
        if not rows[row + _ESCAPE]:
            return NO_ESCAPE
        if gamma >= GAMMA_LIMIT:
            return TOO_FAR
        # Each act of coding sends at most two bytes out; an escape has two for every digit.
        if end + 2 * (count - n) + 4 * _digits(gamma) + 2 > room:
            return NO_ROOM
        base, last, end = _put_escape(base, last, out, end, gamma, value < 0, cdf, rows, row)
        n += 1


@entry(f"int64({_U8}, int64, {_U32}, int64, {_U32}, {_U32}, {_U16}, {_I32}, {_U64}, int64)")
def decode(data, size, indexes, count, cdf, rows, lookup, symbols, state, ends):
    """Decodes `count` symbols out of `size` bytes -> status.

    It goes on from `state`, four zeros at first, and leaves it there for more symbols; if they are
    the last, `ends`, the end is checked.
    """
    base, last, within, at = state[0], state[1], state[2], np.int64(state[3])
    if at == 0:
        last, at = _FULL, 4
        within = _two_bytes(data, size, 0) << _16 | _two_bytes(data, size, 2)  # the word, less base
    for n in range(count):
        row = indexes[n] * _ROW
        bits = np.uint64(rows[row + _BITS])
        target = _target(within, last, bits)
        bucket = (target - _1) >> (bits - _LOOKUP if bits > _LOOKUP else _0)
        first = rows[row]
        place = np.uint32(first + lookup[(np.uint64(indexes[n]) << _LOOKUP) + bucket])
        low, high = np.uint64(cdf[place]), np.uint64(cdf[place + _ONE])
        while high < target:
            place += _ONE
            low, high = high, np.uint64(cdf[place + _ONE])
        start, last = _narrow(_0, last, low, high, bits)
        base, within = (base + start) & _FULL, within - start
        if last <= _LOW:
            base, last, within, at = _shift(base, last, within, at, data, size)
        length, offset = np.int64(rows[row + _LENGTH]), np.int64(np.int32(rows[row + _OFFSET]))
        value = np.int64(place - first)
        if value == length:  # only rows with an escape have this symbol
            found = _take_escape(base, last, within, at, data, size)
            gamma, negative, base, last, within, at = found
            if gamma == 0:
                return BAD_STREAM
            value = -gamma if negative else gamma + length - 1
            if value + offset != np.int32(value + offset):
                return BAD_STREAM
        symbols[n] = value + offset
    state[0], state[1], state[2], state[3] = base, last, within, np.uint64(at)
    word = (base + within) & _FULL
    return OK if not ends or _ends_well(base, last, word, at, size) else BAD_STREAM
