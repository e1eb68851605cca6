#!/usr/bin/env bash
# tensorflow-datasets 4.9.9: boxes of PASCAL VOC are a pixel short at the left and at the top.
#
# VOC counts pixels from 1, and a box holds its last ones: of an image of 100 x 50 pixels the whole
# is xmin 1, ymin 1, xmax 100, ymax 50. Guessed: TFDS, which gives boxes as fractions of the sides,
# takes 1 from xmin and ymin, as readers with boxes from 0 do, and gives 0, 0, 1, 1. Seen: it divides
# the numbers as they stand, and gives ymin 0.02, xmin 0.01, ymax 1, xmax 1. A box of one pixel has
# no area at all. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q tensorflow-datasets==4.9.9 tensorflow-cpu==2.17.1 tensorflow-metadata==1.16.1
cd "$folder"
TF_CPP_MIN_LOG_LEVEL=3 "$folder/env/bin/python" - <<'PYTHON'
from tensorflow_datasets.object_detection import voc

box = """<object><name>dog</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""
boxes = box.format(1, 1, 100, 50) + box.format(30, 20, 30, 20)
with open("000001.xml", "w") as file:
    size = "<size><width>100</width><height>50</height><depth>3</depth></size>"
    file.write(f"<annotation>{size}{boxes}</annotation>")
whole, pixel = (tuple(one["bbox"]) for one in voc._get_example_objects("000001.xml"))
print(f"whole image: {whole}; one pixel: {pixel}")
assert whole == (0.02, 0.01, 1.0, 1.0) and pixel == (0.4, 0.3, 0.4, 0.3)
PYTHON
