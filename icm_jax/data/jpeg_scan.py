"""Entropy decoding of one scan of a JPEG file (ITU-T T.81, annexes F and G), compiled.

    tables -> `fill`;  bytes -> `unstuff` -> `sequential` or `progressive` -> coefficients

What is wrong with a scan is told by a key of `ERRORS`.
"""

import numpy as np

from icm_jax.compiled import compiled

LOOK = 10  # bits that the lookup tables see at once
_LEFT_OVER = 16
"""Bytes after the last block of a scan that are passed over: some writers leave a few."""

ERRORS = {
    1: "has bits that are no Huffman code",
    2: "has a block of more than 64 coefficients",
    3: "ends before its last block",
    4: "has restart markers out of order",
    5: "has data after its last block",
    6: "has a value that no encoder writes",
}

# Kernels. Bits lie left-aligned in a uint64; uint64 with int64 makes float64, hence the constants.
_0, _1, _2, _3, _4, _8, _16, _24, _32, _54, _63, _64 = (
    np.uint64(n) for n in (0, 1, 2, 3, 4, 8, 16, 24, 32, 64 - LOOK, 63, 64)
)


@compiled
def fill(table, kind, lookup, codes):
    """Builds the tables of a Huffman code; False if lengths and counts are contradictory.

    lookup[bits]: 0 for codes longer than LOOK, else length | run << 5 | size << 9, or, where the
    value follows within the LOOK bits, length of both | run << 5 | 1 << 13 | value << 16.
    codes[0, n]: first code of length n; [1, n]: one past the last; [2, n]: place of its symbol.
    """
    code, place = 0, 0
    for length in range(1, 17):
        codes[0, length] = code
        codes[2, length] = place
        for _ in range(table[length - 1]):
            if code >= (1 << length) - (kind == 2):
                return False
            if length <= LOOK:
                symbol = table[16 + place]
                run, size = symbol >> 4, symbol & 15
                spare = LOOK - length
                for rest in range(1 << spare):
                    entry = length | run << 5 | size << 9
                    if kind == 1 and 0 < size <= spare:
                        value = rest >> (spare - size)
                        if value < 1 << (size - 1):
                            value += 1 - (1 << size)
                        entry = (length + size) | run << 5 | 1 << 13 | value << 16
                    lookup[code << spare | rest] = entry
            code += 1
            place += 1
        codes[1, length] = code
        code <<= 1
    return True


@compiled
def unstuff(data, at, clean, ends):
    """Copies entropy-coded bytes without stuffed zeros; interval i ends at ends[i] in `clean`.

    Returns: (place of the marker after the scan, how many intervals; more than there are ends if
      their markers are out of order).
    """
    start, to, length, found = np.uint64(at), _0, np.uint64(len(data)), 0
    while start < length:
        byte = data[start]
        clean[to] = byte
        start += _1
        if byte != 0xFF:
            to += _1
            continue
        after = start
        while after < length and data[after] == 0xFF:
            after += _1
        if after < length and data[after] == 0 and after == start:
            to += _1
            start += _1
        elif after < length and 0xD0 <= data[after] <= 0xD7:
            if data[after] != 0xD0 + found % 8 or found + 1 >= len(ends):
                return np.int64(start) - 1, len(ends) + 1
            ends[found] = to
            found += 1
            start = after + _1
        else:
            start -= _1
            break
    clean[to : to + _8] = 0
    ends[found] = to
    return np.int64(start), found + 1


@compiled
def _symbol(bits, codes, table, least):
    """(length, symbol) of a code of `least` bits or more; length 17 if there is none."""
    for length in range(least, 17):
        code = np.int64(bits >> np.uint64(64 - length))
        if code < codes[table, 17 + length]:
            return length, codes[
                table, 51 + codes[table, 34 + length] + code - codes[table, length]
            ]
    return 17, np.int64(0)


@compiled
def _four(clean, at):
    """The next four bytes, left-aligned; `at` is unsigned, which spares tests for wrap-around."""
    low = np.uint64(clean[at + _2]) << _8 | np.uint64(clean[at + _3])
    return (np.uint64(clean[at]) << _24 | np.uint64(clean[at + _1]) << _16 | low) << _32


@compiled
def _value(bits, size):
    """The signed number of T.81's tables F.1 and F.2 that the first `size` bits stand for."""
    value = np.int64(bits >> np.uint64(64 - size))
    return value if value >= 1 << (size - 1) else value + 1 - (1 << size)


@compiled
def sequential(clean, ends, out, layout, rows, columns, restart, lookups, codes, zigzag):
    """All blocks of a baseline scan; returns a key of ERRORS, or 0."""
    last = np.zeros(4, np.int64)
    bits, have = np.uint64(0), 0
    at, limit, interval, todo = np.uint64(0), np.uint64(len(clean)), 0, restart
    for row in range(rows):
        for column in range(columns):
            if todo == 0:  # a restart marker: decoding begins afresh behind it
                used = np.int64(at) - have // 8
                if used > ends[interval]:
                    return 3
                if ends[interval] - used > _LEFT_OVER:
                    return 5
                at, have, bits, todo = np.uint64(ends[interval]), 0, np.uint64(0), restart
                interval += 1
                last[:] = 0
            todo -= 1
            # Of each component a block of blocks: (place in `out`, blocks in a row, wide, high).
            for c in range(len(layout)):
                wide, high = layout[c, 2], layout[c, 3]
                for block in range(wide * high):
                    y = row * high + block // wide
                    x = column * wide + block % wide
                    base = np.uint64(layout[c, 0] + 64 * (y * layout[c, 1] + x))
                    if have < 32:
                        if at + _4 > limit:
                            return 3
                        bits, have, at = (
                            bits | _four(clean, at) >> np.uint64(have),
                            have + 32,
                            at + _4,
                        )
                    # DC: a code that says how many bits of the difference follow it.
                    entry = np.int64(lookups[np.uint64(2 * c << LOOK) | bits >> _54])
                    length, size = entry & 31, (entry >> 9) & 15
                    if entry == 0:
                        length, size = _symbol(bits, codes, 2 * c, LOOK + 1)
                        if length == 17:
                            return 1
                    bits <<= np.uint64(length)
                    have -= length
                    if size:
                        last[c] += _value(bits, size)
                        bits <<= np.uint64(size)
                        have -= size
                    out[base] = last[c]
                    # AC: codes of (zeros before it, bits of the value), until all 64 are told.
                    k, table = _1, np.uint64((2 * c + 1) << LOOK)
                    while k < _64:
                        if have < 32:
                            if at + _4 > limit:
                                return 3
                            bits |= _four(clean, at) >> np.uint64(have)
                            at += _4
                            have += 32
                        entry = np.int64(lookups[table | bits >> _54])
                        length = entry & 31
                        if entry & 8192:  # the common case: code and value in one look
                            k += np.uint64((entry >> 5) & 15)
                            if k > _63:
                                return 2
                            out[base + zigzag[k]] = entry >> 16
                            bits <<= np.uint64(length)
                            have -= length
                            k += _1
                            continue
                        run, size = (entry >> 5) & 15, (entry >> 9) & 15
                        if entry == 0:
                            length, symbol = _symbol(bits, codes, 2 * c + 1, LOOK + 1)
                            if length == 17:
                                return 1
                            run, size = symbol >> 4, symbol & 15
                        bits <<= np.uint64(length)
                        have -= length
                        if size == 0:
                            if run == 0:  # all others are zero
                                break
                            if run < 15:  # else 16 zeros
                                return 6
                            k += _16
                            if k > _63:
                                return 2
                            continue
                        k += np.uint64(run)
                        if k > _63:
                            return 2
                        out[base + zigzag[k]] = _value(bits, size)
                        bits <<= np.uint64(size)
                        have -= size
                        k += _1
    used = np.int64(at) - have // 8
    if used > ends[interval]:
        return 3
    return 5 if ends[interval] - used > _LEFT_OVER else 0


@compiled
def _more(clean, bits, have, at):
    """(bits, how many, place) with at least 32 bits; zeros behind the end."""
    if have < 32:
        for i in range(4):
            byte = clean[at + i] if at + i < len(clean) else np.uint8(0)
            bits |= np.uint64(byte) << np.uint64(56 - have)
            have += 8
        at += 4
    return bits, have, at


@compiled
def _refine(out, place, low, clean, bits, have, at):
    """Adds the next bit, of weight 2^low, to a coefficient that is not zero; the bits after it, as
    of `_more`."""
    bits, have, at = _more(clean, bits, have, at)
    if bits >> _63 and not out[place] & (1 << low):
        out[place] += (1 if out[place] > 0 else -1) << low
    return bits << _1, have - 1, at


@compiled
def progressive(clean, ends, out, layout, rows, columns, restart, codes, scan, zigzag):
    """All blocks of one scan of a progressive file; returns a key of ERRORS, or 0."""
    start, end, refines, low = scan[0], scan[1], scan[2] > 0, scan[3]
    last = np.zeros(4, np.int64)
    bits, have = np.uint64(0), 0
    at, interval, todo, run_of_ends = 0, 0, restart, 0
    for row in range(rows):
        for column in range(columns):
            if todo == 0:
                used = at - have // 8
                if used > ends[interval]:
                    return 3
                if ends[interval] - used > _LEFT_OVER or run_of_ends:
                    return 5
                at, have, bits, todo = ends[interval], 0, np.uint64(0), restart
                interval += 1
                last[:] = 0
            todo -= 1
            if at - have // 8 > ends[interval]:
                return 3
            for c in range(len(layout)):
                wide, high = layout[c, 2], layout[c, 3]
                for block in range(wide * high):
                    y = row * high + block // wide
                    x = column * wide + block % wide
                    base = layout[c, 0] + 64 * (y * layout[c, 1] + x)
                    if start == 0:  # DC: first its higher bits as a difference, then a bit a scan
                        bits, have, at = _more(clean, bits, have, at)
                        if refines:
                            if bits >> _63:
                                out[base] |= np.int16(1 << low)
                            bits <<= _1
                            have -= 1
                            continue
                        length, size = _symbol(bits, codes, 2 * c, 1)
                        if length == 17:
                            return 1
                        bits <<= np.uint64(length)
                        have -= length
                        if size:
                            value = _value(bits, size)
                            bits <<= np.uint64(size)
                            have -= size
                            last[c] += value
                        out[base] = np.int16(last[c] << low)
                        continue
                    # AC: as in `sequential`, but that a code may end this block and many after it,
                    # and that a refining scan tells new values of one bit, a bit of each old one.
                    k = start
                    while k <= end and run_of_ends == 0:
                        bits, have, at = _more(clean, bits, have, at)
                        length, symbol = _symbol(bits, codes, 2 * c + 1, 1)
                        if length == 17:
                            return 1
                        bits <<= np.uint64(length)
                        have -= length
                        run, size = symbol >> 4, symbol & 15
                        value = 0
                        if size == 0 and run < 15:  # 2^run blocks and more end here, this one too
                            run_of_ends = 1 << run
                            if run:
                                run_of_ends += np.int64(bits >> np.uint64(64 - run))
                                bits <<= np.uint64(run)
                                have -= run
                            break
                        if size and not refines:
                            value = _value(bits, size)
                            bits <<= np.uint64(size)
                            have -= size
                        elif size:
                            if size != 1:
                                return 6
                            value = 1 if bits >> _63 else -1
                            bits <<= _1
                            have -= 1
                        if not refines:
                            k += run + (size == 0)
                        else:  # pass over `run` coefficients that are zero yet, and refine others
                            while k <= end:
                                place = base + np.int64(zigzag[k])
                                if out[place] == 0:
                                    if run == 0:
                                        break
                                    run -= 1
                                else:
                                    bits, have, at = _refine(out, place, low, clean, bits, have, at)
                                k += 1
                        if size:
                            if k > end:
                                return 2
                            out[base + np.int64(zigzag[k])] = np.int16(value << low)
                        elif k > end + (not refines):
                            return 2
                        k += size > 0 or refines
                    if run_of_ends:
                        while refines and k <= end:
                            place = base + np.int64(zigzag[k])
                            if out[place] != 0:
                                bits, have, at = _refine(out, place, low, clean, bits, have, at)
                            k += 1
                        run_of_ends -= 1
    used = at - have // 8
    if used > ends[interval]:
        return 3
    return 5 if ends[interval] - used > _LEFT_OVER or run_of_ends else 0
