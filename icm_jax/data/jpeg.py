"""JPEG files -> DCT coefficients, without inverse DCT (ITU-T T.81).

    bytes -> markers: tables, frame, scans -> entropy decoding -> planes of 8×8 blocks

Baseline, extended (8 bits, Huffman) and progressive files of any size, sampling and number of
components, with restart intervals. A file whose entropy-coded data end early, run over or cannot
be decoded is an error: no plane is ever filled in.
"""

import functools
from typing import NamedTuple

import numpy as np

from icm_jax.compiled import compiled
from icm_jax.errors import IcmError

LOOK = 10  # bits that the lookup tables see at once
_LEFT_OVER = 16
"""Bytes after the last block of a scan that are passed over: some writers leave a few."""

ZIGZAG = np.array(
    sorted(range(64), key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8)),
    np.uint64,
)
"""Place in a block, by rows, of the k-th coefficient."""


_MIRRORED = np.array([(-1) ** (i % 8) for i in range(64)], np.int16)
"""Cosines of odd frequency change their sign where an image is mirrored."""


class Coefficients(NamedTuple):
    """What a JPEG file holds.

    Attributes:
      planes: int16 [ceil(h / 8), ceil(w / 8), 64] of each component of h × w samples: quantised
        coefficients, by rows within a block (lowest frequency first). DC is of samples minus 128.
      tables: int32 [64], quantisation steps of each component in the same order.
      height, width: of the image, in pixels.
      sampling: (horizontal, vertical) factors of each component.
      adobe: colour transform of an Adobe segment (0: RGB or CMYK, 1: YCbCr, 2: YCCK), else -1.
    """

    planes: tuple[np.ndarray, ...]
    tables: tuple[np.ndarray, ...]
    height: int
    width: int
    sampling: tuple[tuple[int, int], ...]
    adobe: int

    def dequantised(self) -> tuple[np.ndarray, ...]:
        """The planes times their tables, int32."""
        return tuple(p * t for p, t in zip(self.planes, self.tables, strict=True))

    def flipped(self) -> "Coefficients":
        """Of the image mirrored left to right, exactly.

        Raises: IcmError if the width is no multiple of `grid`: blocks would not fall on blocks.
        """
        if self.width % self.grid[1]:
            raise IcmError(f"a width of {self.width} is no multiple of {self.grid[1]}: crop first")
        planes = tuple(plane[:, ::-1] * _MIRRORED for plane in self.planes)
        return self._replace(planes=planes)

    def cropped(self, top: int, left: int, height: int, width: int) -> "Coefficients":
        """Of a part of the image, all four in pixels, exactly.

        Raises: IcmError if the part is not inside the image, or if its corner is no multiple of
          `grid`, or its sides are none and do not end with the image.
        """
        planes, size = [], (self.height, self.width)
        for first, side, whole, step in zip(
            (top, left), (height, width), size, self.grid, strict=True
        ):
            if first % step or (side % step and first + side != whole):
                raise IcmError(
                    f"crop {first} to {first + side} of {whole}: multiples of {step} only"
                )
            if first < 0 or side < 1 or first + side > whole:
                raise IcmError(f"crop {first} to {first + side} is not inside {whole} pixels")
        for plane, (h, v) in zip(self.planes, self.sampling, strict=True):
            steps = self.grid[0] // v, self.grid[1] // h  # pixels of the image in a block's side
            rows = slice(top // steps[0], _up(top + height, steps[0]))
            planes.append(plane[rows, left // steps[1] : _up(left + width, steps[1])])
        return self._replace(planes=tuple(planes), height=height, width=width)

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in pixels of what all components divide into blocks: MCUs."""
        return 8 * max(v for _, v in self.sampling), 8 * max(h for h, _ in self.sampling)


class _Component(NamedTuple):
    identifier: int
    horizontal: int
    vertical: int
    table: int
    rows: int  # blocks that hold samples of the image
    columns: int
    stride: int  # blocks in a row of the buffer, which holds whole MCUs
    offset: int  # of the first coefficient in the buffer
    number: int


class _Frame(NamedTuple):
    progressive: bool
    height: int
    width: int
    components: tuple[_Component, ...]
    mcus: tuple[int, int]  # rows, columns
    size: int  # of the buffer


def read_coefficients(data: bytes, name: str = "JPEG file", pixels: int = 1 << 28) -> Coefficients:
    """The coefficients of a JPEG file.

    Args:
      data: the whole file. name: what errors call it.
      pixels: the largest image that is read.

    Raises: IcmError if `data` is no JPEG file, is one of another process (lossless, hierarchical,
      arithmetic coding, 12 bits), or is truncated or damaged.
    """
    try:
        return _read(data, pixels)
    except _Damaged as error:
        raise IcmError(f"{name}: {error}") from None


class _Damaged(Exception):
    pass


def _read(data: bytes, pixels: int) -> Coefficients:
    if data[:2] != b"\xff\xd8":
        raise _Damaged("is no JPEG file")
    buffer = np.frombuffer(data, np.uint8)
    quantisation: dict[int, np.ndarray] = {}
    huffman: dict[int, bytes] = {}
    latched: dict[int, np.ndarray] = {}  # table of a component when its first scan began
    frame, coefficients, restart, adobe, at = None, None, 0, -1, 2
    progress: dict[int, np.ndarray | None] = {}
    while True:
        at, marker = _next_marker(data, at)
        if marker == 0xD9:
            break
        if marker == 0 and frame and not frame.progressive and len(progress) == len(latched):
            break  # no end of image, but all that a sequential file can have is there
        if marker == 0:
            raise _Damaged("ends before its end-of-image marker; it is truncated")
        if 0xD0 <= marker <= 0xD8 or marker == 0x01:
            raise _Damaged(f"has a marker FF{marker:02X} where none may be")
        length = int.from_bytes(data[at : at + 2], "big")
        if length < 2 or at + length > len(data):
            raise _Damaged(f"ends inside the segment FF{marker:02X}; it is truncated or damaged")
        body, at = data[at + 2 : at + length], at + length
        if marker == 0xDB:
            quantisation |= _quantisation_tables(body)
        elif marker == 0xC4:
            _huffman_tables(body, huffman)
        elif marker in (0xC0, 0xC1, 0xC2):
            if frame:
                raise _Damaged("has two frames")
            kind = body, marker == 0xC2, pixels
            frame = _frame(*kind)
            coefficients = np.zeros(frame.size, np.int16)
        elif 0xC3 <= marker <= 0xCF and marker != 0xC8:
            raise _Damaged(
                f"is of a kind that is not read (FF{marker:02X}: lossless, hierarchical or "
                "arithmetic coding)"
            )
        elif marker == 0xDD:
            if len(body) != 2:
                raise _Damaged("has a damaged restart interval")
            restart = int.from_bytes(body, "big")
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        elif marker == 0xDA:
            if frame is None:
                raise _Damaged("has a scan before its frame")
            scan = _scan_header(body, kind)
            for component in scan.components:
                if component.number not in latched:
                    if component.table not in quantisation:
                        raise _Damaged(f"lacks its quantisation table {component.table}")
                    latched[component.number] = quantisation[component.table]
            _check_order(scan, frame, progress)
            at = _decode_scan(buffer, at, frame, scan, huffman, restart, coefficients)
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):  # applications, comments
            raise _Damaged(f"has a segment FF{marker:02X}, which is not read")
    if frame is None or len(latched) < len(frame.components):
        raise _Damaged("ends before all of its components; it is truncated or damaged")
    planes = []
    for c in frame.components:
        rows = c.vertical * frame.mcus[0]
        plane = coefficients[c.offset : c.offset + 64 * rows * c.stride]
        planes.append(plane.reshape(rows, c.stride, 64)[: c.rows, : c.columns])
    sampling = tuple((c.horizontal, c.vertical) for c in frame.components)
    tables = tuple(latched[number] for number in range(len(planes)))
    return Coefficients(tuple(planes), tables, frame.height, frame.width, sampling, adobe)


def _next_marker(data: bytes, at: int) -> tuple[int, int]:
    """(place after the next marker, its second byte); 0 at the end of the data."""
    if at < len(data) and data[at] != 0xFF:
        raise _Damaged(f"has no marker at byte {at}; it is damaged")
    while at < len(data) and data[at] == 0xFF:
        at += 1  # any number of fill bytes
    return at + 1, data[at] if at < len(data) else 0


@functools.lru_cache(256)
def _quantisation_tables(body: bytes) -> dict[int, np.ndarray]:
    at, tables = 0, {}
    while at < len(body):
        wide, number = body[at] >> 4, body[at] & 15
        size = 64 * (1 + wide)
        if wide > 1 or number > 3 or at + 1 + size > len(body):
            raise _Damaged("has a damaged quantisation table")
        values = np.frombuffer(body, ">u2" if wide else np.uint8, 64, at + 1)
        tables[number] = np.zeros(64, np.int32)
        tables[number][ZIGZAG] = values
        tables[number].setflags(write=False)
        at += 1 + size
    return tables


def _huffman_tables(body: bytes, tables: dict[int, bytes]) -> None:
    """Their counts and symbols; DC has the numbers 0 to 3, AC 16 to 19."""
    at = 0
    while at < len(body):
        counts = body[at + 1 : at + 17]
        end = at + 17 + sum(counts)
        kind, number = body[at] >> 4, body[at] & 15
        if len(counts) < 16 or end > len(body) or kind > 1 or number > 3:
            raise _Damaged("has a damaged Huffman table")
        tables[16 * kind + number] = body[at + 1 : end]
        _huffman_table(tables[16 * kind + number], kind)
        at = end


@functools.lru_cache(64)
def _huffman_table(body: bytes, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """(lookup, codes), see `_fill`; the symbols follow the codes."""
    table = np.frombuffer(body, np.uint8)
    lookup, codes = np.zeros(1 << LOOK, np.int32), np.zeros((3, 17), np.int64)
    if not _fill(table, kind, lookup, codes) or (kind == 0 and (table[16:] > 15).any()):
        raise _Damaged("has a Huffman table whose codes do not fit together")
    # Places of codes that are incomplete may lie behind the last symbol.
    return lookup, np.concatenate([codes.ravel(), table[16:], np.zeros(512 - len(table[16:]), int)])


@functools.lru_cache(64)
def _stacked(bodies: tuple[bytes, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Tables of a scan's components, DC and AC in turn: all lookups end to end, codes [n, 563]."""
    tables = [_huffman_table(body, i % 2) for i, body in enumerate(bodies)]
    return np.concatenate([t[0] for t in tables]), np.stack([t[1] for t in tables])


@functools.lru_cache(256)  # as the other headers: sets have few sizes, and one writer
def _frame(body: bytes, progressive: bool, pixels: int) -> _Frame:
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        raise _Damaged("has a damaged frame header")
    bits, count = body[0], body[5]
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    if bits != 8:
        raise _Damaged(f"has {bits} bits a sample; 8 can be read")
    if not (0 < height and 0 < width and 1 <= count <= 4):
        raise _Damaged(f"claims {height} × {width} pixels of {count} components")
    if height * width > pixels:
        raise _Damaged(f"claims {height} × {width} pixels; at most {pixels} are read")
    fields = [body[6 + 3 * i : 9 + 3 * i] for i in range(count)]
    factors = [(f[1] >> 4, f[1] & 15) for f in fields]
    if any(not 1 <= factor <= 4 for pair in factors for factor in pair):
        raise _Damaged(f"has sampling factors {factors}")
    if len({f[0] for f in fields}) < count or any(f[2] > 3 for f in fields):
        raise _Damaged("has a damaged frame header")
    most = [max(pair[axis] for pair in factors) for axis in (0, 1)]
    mcus = _up(height, 8 * most[1]), _up(width, 8 * most[0])
    components, offset = [], 0
    for number, (field, (h, v)) in enumerate(zip(fields, factors, strict=True)):
        rows = _up(_up(height * v, most[1]), 8)
        columns = _up(_up(width * h, most[0]), 8)
        stride = mcus[1] * h
        own = _Component(field[0], h, v, field[2], rows, columns, stride, offset, number)
        components.append(own)
        offset += 64 * mcus[0] * v * stride
    return _Frame(progressive, height, width, tuple(components), mcus, offset)


def _up(count: int, size: int) -> int:
    """How many pieces of a size hold so many."""
    return -(-count // size)


class _Scan(NamedTuple):
    components: tuple[_Component, ...]
    tables: tuple[tuple[int, int], ...]  # DC, AC
    start: int
    end: int
    high: int
    low: int
    layout: np.ndarray  # int64 [n, 4]: offset, stride, blocks in an MCU's rows and columns
    grid: tuple[int, int]  # rows, columns of MCUs


@functools.lru_cache(256)
def _scan_header(body: bytes, kind: tuple) -> _Scan:
    """`kind`: arguments of `_frame`."""
    frame = _frame(*kind)
    if not body or not 1 <= body[0] <= 4 or len(body) != 4 + 2 * body[0]:
        raise _Damaged("has a damaged scan header")
    components, tables = [], []
    for i in range(body[0]):
        identifier, both = body[1 + 2 * i], body[2 + 2 * i]
        own = [c for c in frame.components if c.identifier == identifier]
        if not own or own[0] in components or max(both >> 4, both & 15) > 3:
            raise _Damaged("has a damaged scan header")
        components += own
        tables.append((both >> 4, 16 + (both & 15)))
    start, end, high, low = body[-3], body[-2], body[-1] >> 4, body[-1] & 15
    blocks = sum(c.horizontal * c.vertical for c in components)
    legal = (start, end, high, low) == (0, 63, 0, 0)
    if frame.progressive:
        legal = start <= end <= 63 and (end == 0 if start == 0 else len(components) == 1)
        legal = legal and low <= 13 and high in (0, low + 1)
    if not legal or (len(components) > 1 and blocks > 10):
        raise _Damaged("has a scan header that its process does not allow")
    alone = len(components) == 1
    layout = [
        (c.offset, c.stride, *((1, 1) if alone else (c.horizontal, c.vertical))) for c in components
    ]
    grid = (components[0].rows, components[0].columns) if alone else frame.mcus
    fields = tuple(components), tuple(tables), start, end, high, low
    return _Scan(*fields, np.array(layout, np.int64), grid)


def _check_order(scan: _Scan, frame: _Frame, progress: dict[int, np.ndarray | None]) -> None:
    """Every bit of every coefficient comes once, the higher ones first."""
    for component in scan.components:
        if not frame.progressive:
            if component.number in progress:
                raise _Damaged("codes a component twice")
            progress[component.number] = None
            continue
        known = progress.setdefault(component.number, np.full(64, -1))
        expected = -1 if scan.high == 0 else scan.high
        if (known[scan.start : scan.end + 1] != expected).any() or (scan.start and known[0] < 0):
            raise _Damaged("has progressive scans in an order that makes no sense")
        known[scan.start : scan.end + 1] = scan.low


ERRORS = {
    1: "has bits that are no Huffman code",
    2: "has a block of more than 64 coefficients",
    3: "ends before its last block",
    4: "has restart markers out of order",
    5: "has data after its last block",
    6: "has a value that no encoder writes",
}


def _decode_scan(buffer, at, frame, scan, huffman, restart, coefficients) -> int:
    """Decodes a scan into `coefficients`; returns where its data end."""
    needed = scan.start == 0 and scan.high == 0, scan.end > 0  # DC, AC
    if any(
        n and t not in huffman for pair in scan.tables for n, t in zip(needed, pair, strict=True)
    ):
        raise _Damaged("lacks a Huffman table")
    unused = bytes(16)
    bodies = [huffman.get(t, unused) for pair in scan.tables for t in pair]
    lookups, codes = _stacked(tuple(bodies))
    count = scan.grid[0] * scan.grid[1]
    intervals = _up(count, restart) if restart else 1
    clean = np.empty(len(buffer) - at + 8, np.uint8)
    ends = np.zeros(intervals, np.int64)
    stop, found = _unstuff(buffer, at, clean, ends)
    if found < intervals:
        raise _Damaged(f"{ERRORS[3]}; it is truncated or damaged")
    if found > intervals:
        raise _Damaged(f"{ERRORS[4]}; it is damaged")
    clean = clean[: ends[-1] + 8]  # eight zeros at the end
    options = (clean, ends, coefficients, scan.layout, *scan.grid, restart or count, lookups, codes)
    if frame.progressive:
        own = np.array([scan.start, scan.end, scan.high, scan.low], np.int64)
        problem = _progressive(*options, own, ZIGZAG)
    else:
        problem = _sequential(*options, ZIGZAG)
    if problem:
        raise _Damaged(f"{ERRORS[problem]}; it is truncated or damaged")
    return stop


# Kernels. Bits lie left-aligned in a uint64; uint64 with int64 makes float64, hence the constants.
_1, _2, _3, _4, _8, _16, _24, _32, _54, _63, _64 = (
    np.uint64(n) for n in (1, 2, 3, 4, 8, 16, 24, 32, 64 - LOOK, 63, 64)
)


@compiled
def _fill(table, kind, lookup, codes):
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
def _unstuff(data, at, clean, ends):
    """Copies entropy-coded bytes without stuffed zeros; interval i ends at ends[i] in `clean`.

    Returns: (place of the marker after the scan, how many intervals; more than there are ends if
      their markers are out of order).
    """
    to, found = 0, 0
    while at < len(data):
        stop = at
        while stop < len(data) and data[stop] != 0xFF:
            stop += 1
        size = stop - at
        clean[to : to + size] = data[at:stop]
        to, at = to + size, stop
        after = at + 1
        while after < len(data) and data[after] == 0xFF:
            after += 1
        if after < len(data) and data[after] == 0 and after == at + 1:
            clean[to] = 0xFF
            to, at = to + 1, at + 2
        elif after < len(data) and 0xD0 <= data[after] <= 0xD7:
            if data[after] != 0xD0 + found % 8 or found + 1 >= len(ends):
                return at, len(ends) + 1
            ends[found] = to
            found, at = found + 1, after + 1
        else:
            break
    clean[to : to + 8] = 0
    ends[found] = to
    return at, found + 1


@compiled
def _long_symbol(bits, codes, table):
    """(length, symbol) of a code of more than LOOK bits; length 17 if there is none."""
    for length in range(LOOK + 1, 17):
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
def _sequential(clean, ends, out, layout, rows, columns, restart, lookups, codes, zigzag):
    """All blocks of a baseline scan; returns a key of ERRORS, or 0."""
    last = np.zeros(4, np.int64)
    bits, have = np.uint64(0), 0
    at, limit, interval, todo = np.uint64(0), np.uint64(len(clean)), 0, restart
    for row in range(rows):
        for column in range(columns):
            if todo == 0:
                used = np.int64(at) - have // 8
                if used > ends[interval]:
                    return 3
                if ends[interval] - used > _LEFT_OVER:
                    return 5
                at, have, bits, todo = np.uint64(ends[interval]), 0, np.uint64(0), restart
                interval += 1
                last[:] = 0
            todo -= 1
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
                    entry = np.int64(lookups[np.uint64(2 * c << LOOK) | bits >> _54])
                    length, size = entry & 31, (entry >> 9) & 15
                    if entry == 0:
                        length, size = _long_symbol(bits, codes, 2 * c)
                        if length == 17:
                            return 1
                    bits <<= np.uint64(length)
                    have -= length
                    if size:
                        last[c] += _value(bits, size)
                        bits <<= np.uint64(size)
                        have -= size
                    out[base] = last[c]
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
                        if entry & 8192:
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
                            length, symbol = _long_symbol(bits, codes, 2 * c + 1)
                            if length == 17:
                                return 1
                            run, size = symbol >> 4, symbol & 15
                        bits <<= np.uint64(length)
                        have -= length
                        if size == 0:
                            if run == 0:
                                break
                            if run < 15:
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
def _symbol(bits, lookups, codes, table):
    """(length, symbol) of a code, the value after it left alone; length 17 if there is none."""
    for length in range(1, 17):
        code = np.int64(bits >> np.uint64(64 - length))
        if code < codes[table, 17 + length]:
            return length, codes[
                table, 51 + codes[table, 34 + length] + code - codes[table, length]
            ]
    return 17, np.int64(0)


@compiled
def _progressive(clean, ends, out, layout, rows, columns, restart, lookups, codes, scan, zigzag):
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
                    if start == 0:
                        bits, have, at = _more(clean, bits, have, at)
                        if refines:
                            if bits >> _63:
                                out[base] |= np.int16(1 << low)
                            bits <<= _1
                            have -= 1
                            continue
                        length, size = _symbol(bits, lookups, codes, 2 * c)
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
                    k = start
                    while k <= end and run_of_ends == 0:
                        bits, have, at = _more(clean, bits, have, at)
                        length, symbol = _symbol(bits, lookups, codes, 2 * c + 1)
                        if length == 17:
                            return 1
                        bits <<= np.uint64(length)
                        have -= length
                        run, size = symbol >> 4, symbol & 15
                        value = 0
                        if size == 0 and run < 15:
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
                                    bits, have, at = _more(clean, bits, have, at)
                                    if bits >> _63 and not out[place] & (1 << low):
                                        out[place] += (1 if out[place] > 0 else -1) << low
                                    bits <<= _1
                                    have -= 1
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
                                bits, have, at = _more(clean, bits, have, at)
                                if bits >> _63 and not out[place] & (1 << low):
                                    out[place] += (1 if out[place] > 0 else -1) << low
                                bits <<= _1
                                have -= 1
                            k += 1
                        run_of_ends -= 1
    used = at - have // 8
    if used > ends[interval]:
        return 3
    return 5 if ends[interval] - used > _LEFT_OVER or run_of_ends else 0
