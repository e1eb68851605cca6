"""One reader of image files: orientation, transparency, depth, and every sampling of JPEG."""

import io

import jpeglib
import numpy as np
import pytest
import simplejpeg
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from icm_jax.data import images, open_source, pipeline
from icm_jax.errors import IcmError

RNG = np.random.default_rng(0)


def stored(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(image: Image.Image, orientation: int, kind: str, **options) -> bytes:
    """A file whose pixels lie so that the orientation brings them upright again."""
    transposes = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = image.transpose(transposes[orientation]) if orientation in transposes else image
    return stored(lying, kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_photograph_is_upright_whatever_its_orientation(real_data, orientation, kind):
    path = sorted((real_data / "photos").rglob("*.jpg"))[0]
    upright = Image.open(path).convert("RGB")
    options = dict(quality=97, subsampling=0) if kind == "JPEG" else {}
    data = turned(upright, orientation, kind, **options)
    if kind == "JPEG":
        assert images.orientation(data) == orientation
    given = images.read_rgb(data, "x").astype(int)
    assert given.shape == (upright.height, upright.width, 3)
    assert np.abs(given - np.asarray(upright)).mean() < (6 if kind == "WEBP" else 2)
    # As Pillow turns it: the same file, decoded by another reader.
    other = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.abs(given - other).max() <= 2
    small = images.read_rgb(data, "x", (60, 80))
    scale = upright.height / small.shape[0]
    if kind == "JPEG":
        assert scale >= 2 and small.shape[0] >= 60 and small.shape[1] >= 80
    assert abs(small.shape[1] * scale - upright.width) <= scale


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_and_masks_lie_on_the_upright_image(tmp_path, orientation):
    """A bright part of an image is where its box and its mask say, in batches as in the command."""
    pixels = np.full((40, 80, 3), 20, np.uint8)
    pixels[8:24, 10:40] = 230
    mask = (pixels[..., 0] > 127).astype(np.uint8)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    data = turned(Image.fromarray(pixels), orientation, "JPEG", quality=100)
    (tmp_path / "images/a.jpg").write_bytes(data)
    Image.fromarray(mask).save(tmp_path / "masks/a.png")
    (tmp_path / "train.txt").write_text("a\n")
    (tmp_path / "classes.txt").write_text("dark\nbright\n")
    source = open_source(ConfigDict(dict(name="mask_folder", path=str(tmp_path))), "train")
    batch = next(pipeline.in_order(source, pipeline.BatchSpec(1, (40, 80))))
    np.testing.assert_array_equal(batch["image"][0, ..., 0] > 127, batch["mask"][0] == 1)
    annotation = '{"image_id": 1, "category_id": 1, "bbox": [10, 8, 30, 16]}'
    (tmp_path / "train.json").write_text(
        '{"images": [{"id": 1, "file_name": "a.jpg", "width": 80, "height": 40}], '
        f'"annotations": [{annotation}], "categories": [{{"id": 1, "name": "bright"}}]}}'
    )
    source = open_source(ConfigDict(dict(name="coco_json", path=str(tmp_path))), "train")
    batch = next(pipeline.in_order(source, pipeline.BatchSpec(1, (80, 80), boxes=1)))
    top, left, bottom, right = np.rint(batch["boxes"][0, 0] * 80).astype(int)
    bright = batch["image"][0, :40, :, 0] > 127
    assert bright[top:bottom, left:right].all() and bright.sum() == 16 * 30
    if orientation > 1:
        with pytest.raises(IcmError, match=f"EXIF orientation {orientation}"):
            pipeline.read_planes(data, "a.jpg", (16, 16))


def test_transparency_is_laid_over_white_and_16_bits_keep_the_upper_8():
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0] = (10, 20, 30, 255)
    clear[1, 0] = (100, 0, 0, 128)
    given = images.read_rgb(stored(Image.fromarray(clear)), "x")
    assert given[0].tolist() == [[10, 20, 30]] * 2 and given[1, 1].tolist() == [255] * 3
    np.testing.assert_allclose(given[1, 0], [177, 127, 127], atol=1)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([7, 8, 9])
    assert (images.read_image(stored(palette, transparency=0), "x") == 255).all()
    deep = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
    np.testing.assert_array_equal(images.read_image(stored(deep), "x"), np.asarray(deep) >> 8)


def test_grey_stays_grey_for_the_command_and_is_repeated_for_networks():
    grey = Image.fromarray(RNG.integers(0, 256, (9, 7)).astype(np.uint8))
    for data in (stored(grey), stored(grey, "JPEG"), turned(grey, 6, "JPEG")):
        plain, colour = images.read_image(data, "x"), images.read_rgb(data, "x")
        assert plain.shape == (9, 7) and colour.shape == (9, 7, 3)
        assert (colour == plain[..., None]).all()


def sampled(path, luma, chroma, height=40, width=56) -> bytes:
    """A JPEG file of these sampling factors (down, across): luma is 16·i, chroma is flat."""
    most = [max(pair) for pair in zip(luma, chroma, strict=True)]
    rows, columns = -(-height // (8 * most[0])), -(-width // (8 * most[1]))

    def blocks(factors, level):
        found = np.zeros((rows * factors[0], columns * factors[1], 8, 8), np.int16)
        found[..., 0, 0] = level
        return found

    y = blocks(luma, 0)
    y[..., 0, 0] = np.arange(y[..., 0, 0].size).reshape(y.shape[:2]) % 9 - 4
    tables = np.full((2, 8, 8), 64, np.uint16)
    image = jpeglib.from_dct(y, blocks(chroma, 4), blocks(chroma, -4), qt=tables)
    image.quant_tbl_no = np.array([0, 1, 1])
    image.height, image.width = height, width
    image.samp_factor = np.array([luma, chroma, chroma])
    image.write_dct(str(path))
    return path.read_bytes()


@pytest.mark.parametrize(
    "luma, chroma, known",
    [
        ((2, 4), (1, 1), False),  # 4:1:0
        ((1, 3), (1, 1), False),
        ((3, 1), (1, 1), False),
        ((1, 1), (2, 2), False),  # chroma finer than luma
        ((1, 1), (1, 2), False),
        ((4, 1), (1, 1), False),  # 4:4:1
        ((1, 4), (1, 1), True),  # 4:1:1
        ((2, 2), (1, 1), True),
    ],
)
def test_every_sampling_of_jpeg_is_read(tmp_path, luma, chroma, known):
    data = sampled(tmp_path / "sampled.jpg", luma, chroma)
    if not known:
        with pytest.raises((ValueError, KeyError)):
            simplejpeg.decode_jpeg_header(data)
    given = images.read_rgb(data, "x")
    other = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert given.shape == (40, 56, 3)
    np.testing.assert_allclose(given, other, atol=2)
    # Cb is 128 + 4·64/8, Cr 128 - 4·64/8: more blue than red, where nothing is clipped.
    assert (given[..., 2].astype(int) - given[..., 0]).min() > 60
    for damaged in (data[: len(data) // 2], data[:300]):
        with pytest.raises(IcmError, match=r"cannot read the image x: .*repair or remove it"):
            images.read_image(damaged, "x")


def test_ids_of_masks_are_mapped():
    mask = Image.fromarray(np.array([[7, 8], [255, 30]], np.uint8))
    data = stored(mask)
    with pytest.raises(IcmError, match=r"class id 30.*ids are 0 to 18"):
        images.read_mask(data, "m", 19)
    with pytest.raises(IcmError, match=r"class id 30.*mask_ids lists 2"):
        images.read_mask(data, "m", 19, {7: 0, 8: 1})
    given = images.read_mask(data, "m", 19, {7: 0, 8: 1, images.OTHERS: 255})
    assert given.tolist() == [[0, 1], [255, 255]] and given.dtype == np.uint8
    assert images.read_mask(data, "m", 19, {7: 3, 8: 3, 30: 2, 255: 4}).tolist() == [[3, 3], [4, 2]]


def test_what_is_no_image_is_named():
    for data in (b"", b"text", b"\xff\xd8\xff\xe0 and no more"):
        with pytest.raises(IcmError, match="cannot read the image x"):
            images.read_image(data, "x")
