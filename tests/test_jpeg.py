"""DCT coefficients of JPEG files, against an independent reader (jpeglib, over libjpeg)."""

import io

import jpeglib
import numpy as np
import pytest
import scipy.fft
from PIL import Image

from icm_jax.data import jpeg
from icm_jax.errors import IcmError

RNG = np.random.default_rng(0)
WRITERS = (
    dict(),
    dict(optimize=True, quality=1),
    dict(quality=100, subsampling=0),
    dict(subsampling=1),
    dict(progressive=True),
    dict(progressive=True, subsampling=0, quality=97),
    dict(restart_marker_blocks=3),
    dict(restart_marker_rows=1, progressive=True),
    dict(exif=b"Exif\0\0" + bytes(3000), comment=b"a comment"),
)


def picture(height, width):
    """uint8 with edges and noise."""
    y, x = np.mgrid[:height, :width] / 8
    smooth = np.stack([np.sin(x * y / 9), np.cos(x), np.sign(np.sin(y + x))], axis=-1)
    return (128 + 90 * smooth + RNG.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)


def written(image, mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def independent(data, folder):
    """The same planes by jpeglib, and its quantisation tables."""
    path = folder / "file.jpg"
    path.write_bytes(data)
    found = jpeglib.read_dct(path)
    names = [name for name in ("Y", "Cb", "Cr", "K") if getattr(found, name, None) is not None]
    planes = [getattr(found, name) for name in names]
    return [plane.reshape(*plane.shape[:2], 64) for plane in planes], found


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", WRITERS, ids=lambda options: "-".join(options) or "plain")
def test_equal_to_an_independent_reader(options, mode, tmp_path):
    for size in ((1, 1), (7, 9), (16, 17), (67, 130)):
        data = written(picture(*size), mode, **options)
        own = jpeg.read_coefficients(data)
        planes, found = independent(data, tmp_path)
        assert (own.height, own.width) == size and len(own.planes) == len(planes)
        for plane, table, expected in zip(own.planes, own.tables, planes, strict=True):
            np.testing.assert_array_equal(plane, expected)
            assert any((table == t.ravel()).all() for t in found.qt)


def test_real_files_are_equal(real_data, tmp_path):
    for path in sorted(real_data.rglob("*.jpg"))[::40]:
        data = path.read_bytes()
        own = jpeg.read_coefficients(data, path.name)
        planes, _ = independent(data, tmp_path)
        for plane, expected in zip(own.planes, planes, strict=True):
            np.testing.assert_array_equal(plane, expected)


def test_coefficients_are_those_of_the_pixels():
    """The inverse DCT of what is read is the image, up to quantisation."""
    image = picture(24, 40)[..., 0]
    own = jpeg.read_coefficients(written(image, "L", quality=100))
    given = samples(own.dequantised()[0])[:24, :40]
    assert np.abs(given - image).max() <= 2.5


def samples(plane):
    """A plane's pixels by SciPy's inverse DCT, float64."""
    rows, columns, _ = plane.shape
    blocks = scipy.fft.idctn(plane.reshape(rows, columns, 8, 8), axes=(2, 3), norm="ortho")
    return 128 + blocks.transpose(0, 2, 1, 3).reshape(8 * rows, 8 * columns)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_mirrored_and_cropped_coefficients_are_those_of_such_images(subsampling):
    own = jpeg.read_coefficients(written(picture(56, 64), subsampling=subsampling))
    grid = own.grid
    assert grid == ((8, 8), (8, 16), (16, 16))[subsampling]
    for before, after in zip(own.dequantised(), own.flipped().dequantised(), strict=True):
        np.testing.assert_allclose(samples(after), samples(before)[:, ::-1], atol=1e-9)
    part = own.cropped(16, 32, 40, 16)
    assert (part.height, part.width) == (40, 16)
    for (h, v), before, after in zip(own.sampling, own.planes, part.planes, strict=True):
        rows, columns = 16 * v // grid[0], 32 * h // grid[1]
        expected = before[rows:, columns : columns + 16 * h // grid[1]]
        np.testing.assert_array_equal(after, expected)


def test_parts_that_are_no_blocks_are_refused():
    own = jpeg.read_coefficients(written(picture(50, 60)))
    with pytest.raises(IcmError, match="crop first"):
        own.flipped()
    for part in ((4, 0, 16, 16), (0, 0, 20, 16), (0, 0, 64, 16), (0, 16, 16, 0)):
        with pytest.raises(IcmError, match="crop"):
            own.cropped(*part)


@pytest.mark.filterwarnings("default")
def test_altered_files_are_errors_or_read_as_by_the_independent_reader(tmp_path):
    image, read = picture(37, 50), 0
    files = [written(image, mode, **options) for options in WRITERS[:8] for mode in ("RGB", "L")]
    for number in range(1600):
        data = bytearray(files[number % len(files)])
        at = int(RNG.integers(len(data)))
        kind = number // len(files) % 4
        if kind == 0:
            data[at] ^= 1 << int(RNG.integers(8))
        elif kind == 1:
            data[at] = int(RNG.integers(256))
        elif kind == 2:
            del data[at:]
        else:
            del data[at : at + int(RNG.integers(1, 4))]
        try:
            own = jpeg.read_coefficients(bytes(data), pixels=1 << 20)
        except IcmError:
            continue
        planes, _ = independent(bytes(data), tmp_path)
        for plane, expected in zip(own.planes, planes, strict=True):
            np.testing.assert_array_equal(plane, expected)
        read += 1
    assert read > 100  # alterations of tables and comments


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "no JPEG file"),
        (b"\x89PNG\r\n", "no JPEG file"),
        (b"\xff\xd8\xff\xd9", "before all of its components"),
        (b"\xff\xd8\xff\xdb\x00\x50", "ends inside the segment FFDB"),
        (b"\xff\xd8\xff\xc9\x00\x02", "arithmetic"),
        (b"\xff\xd8\xff\xc0\x00\x0b\x0c\x00\x08\x00\x08\x01\x01\x11\x00", "12 bits"),
        (b"\xff\xd8\xff\xc0\x00\x0b\x08\xff\xff\xff\xff\x01\x01\x11\x00", "at most"),
    ],
)
def test_what_is_no_such_file_is_said(data, message):
    with pytest.raises(IcmError, match=f"photo .*{message}"):
        jpeg.read_coefficients(data, "photo")


def test_files_without_their_last_bytes():
    """All blocks are there, only the end mark is not: the coefficients are whole."""
    data = written(picture(33, 20))
    own = jpeg.read_coefficients(data[:-2])
    for plane, expected in zip(own.planes, jpeg.read_coefficients(data).planes, strict=True):
        np.testing.assert_array_equal(plane, expected)
    with pytest.raises(IcmError, match="truncated"):
        jpeg.read_coefficients(data[:-12])
    with pytest.raises(IcmError, match="truncated"):
        jpeg.read_coefficients(written(picture(33, 20), progressive=True)[:-2])
