#!/usr/bin/env bash
# simplejpeg 1.9.0 (over TurboJPEG): a JPEG without a readable header may still be decoded.
#
# Guessed: a sampling that TurboJPEG does not know makes decode_jpeg_header raise ValueError, and
# what has no header there cannot be decoded either. Seen: so it is with 4:1:0, luma of 3x1 and
# chroma finer than luma ("Could not determine subsampling level of JPEG image"), all of which
# Pillow 11.3.0 reads. But for 4:4:1 (four rows of luma to one of chroma) decode_jpeg_header raises
# KeyError 6, as simplejpeg has no name for a sampling that TurboJPEG knows, while decode_jpeg
# decodes the file. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q simplejpeg==1.9.0 jpeglib==1.0.2 pillow==11.3.0 "numpy<3"
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import io, jpeglib, numpy as np, simplejpeg
from PIL import Image


def written(luma, chroma):
    def blocks(factors):
        most = [max(pair) for pair in zip(luma, chroma)]
        shape = [-(-side // m) * f for side, m, f in zip((5, 7), most, factors)]
        found = np.zeros((*shape, 8, 8), np.int16)
        found[..., 0, 0] = np.arange(found[..., 0, 0].size).reshape(shape) % 9 - 4
        return found
    image = jpeglib.from_dct(*map(blocks, (luma, chroma, chroma)), qt=np.full((2, 8, 8), 64, "u2"))
    image.quant_tbl_no, image.height, image.width = np.array([0, 1, 1]), 40, 56
    image.samp_factor = np.array([luma, chroma, chroma])
    image.write_dct("x.jpg")
    return open("x.jpg", "rb").read()


def outcome(read, data):
    try:
        return read(data)
    except (ValueError, KeyError) as error:
        return f"{type(error).__name__} {error}"


for name, luma, chroma in (
    ("4:1:0", (2, 4), (1, 1)), ("3x1", (1, 3), (1, 1)), ("fine chroma", (1, 1), (2, 2)),
    ("4:4:1", (4, 1), (1, 1)),
):
    data = written(luma, chroma)
    header = outcome(simplejpeg.decode_jpeg_header, data)
    pixels = outcome(lambda d: simplejpeg.decode_jpeg(d).shape, data)
    size = Image.open(io.BytesIO(data)).convert("RGB").size
    print(f"{name}: header {header}; pixels {pixels}; Pillow {size}")
    assert size == (56, 40)
    refused = "Could not determine subsampling level"
    if name == "4:4:1":
        assert header == "KeyError 6" and pixels == (40, 56, 3)
    else:
        assert refused in header and refused in str(pixels)
PYTHON
