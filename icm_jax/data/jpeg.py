"""JPEG files -> DCT coefficients, without inverse DCT (ITU-T T.81).

    bytes -> markers: tables, frame, scans -> entropy decoding -> planes of 8×8 blocks

Baseline, extended (8 bits, Huffman) and progressive files of any size, sampling and number of
components, with restart intervals. A file whose entropy-coded data end early, run over or cannot
be decoded is an error: no plane is ever filled in.
"""

import functools
from typing import NamedTuple

import numpy as np

from icm_jax.data.jpeg_scan import ERRORS, LOOK, fill, progressive, sequential, unstuff
from icm_jax.errors import IcmError

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

    >>> import simplejpeg
    >>> grey = np.full((16, 24, 3), 128, np.uint8)
    >>> read = read_coefficients(simplejpeg.encode_jpeg(grey, colorsubsampling="420"))
    >>> [plane.shape for plane in read.planes], read.sampling
    ([(2, 3, 64), (1, 2, 64), (1, 2, 64)], ((2, 2), (1, 1), (1, 1)))
    """
    try:
        return _read(data, pixels)
    except _Damaged as error:
        raise IcmError(f"{name} {error}") from None


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
    progress: dict[int, np.ndarray] = {}
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
    if frame is None or coefficients is None or len(latched) < len(frame.components):
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
    """(lookup, codes), see `fill`; the symbols follow the codes."""
    table = np.frombuffer(body, np.uint8)
    lookup, codes = np.zeros(1 << LOOK, np.int32), np.zeros((3, 17), np.int64)
    if not fill(table, kind, lookup, codes) or (kind == 0 and (table[16:] > 15).any()):
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
        component = _Component(field[0], h, v, field[2], rows, columns, stride, offset, number)
        components.append(component)
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
        named = [c for c in frame.components if c.identifier == identifier]
        if not named or named[0] in components or max(both >> 4, both & 15) > 3:
            raise _Damaged("has a damaged scan header")
        components += named
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


def _check_order(scan: _Scan, frame: _Frame, progress: dict[int, np.ndarray]) -> None:
    """Every bit of every coefficient comes once, the higher ones first."""
    for component in scan.components:
        if not frame.progressive:
            if component.number in progress:
                raise _Damaged("codes a component twice")
            progress[component.number] = np.zeros(0)
            continue
        known = progress.setdefault(component.number, np.full(64, -1))
        expected = -1 if scan.high == 0 else scan.high
        if (known[scan.start : scan.end + 1] != expected).any() or (scan.start and known[0] < 0):
            raise _Damaged("has progressive scans in an order that makes no sense")
        known[scan.start : scan.end + 1] = scan.low


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
    stop, found = unstuff(buffer, at, clean, ends)
    if found < intervals:
        raise _Damaged(f"{ERRORS[3]}; it is truncated or damaged")
    if found > intervals:
        raise _Damaged(f"{ERRORS[4]}; it is damaged")
    clean = clean[: ends[-1] + 8]  # eight zeros at the end
    options = (clean, ends, coefficients, scan.layout, *scan.grid, restart or count)
    if frame.progressive:
        band = np.array([scan.start, scan.end, scan.high, scan.low], np.int64)
        problem = progressive(*options, codes, band, ZIGZAG)
    else:
        problem = sequential(*options, lookups, codes, ZIGZAG)
    if problem:
        raise _Damaged(f"{ERRORS[problem]}; it is truncated or damaged")
    return stop
