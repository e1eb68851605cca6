"""Reading DCT coefficients from JPEG bytes against decoding them to RGB.

    python benchmarks/bench_jpeg.py FOLDER [--quality 90] [--rounds 7]

The images of a folder are scaled, written as JPEG at 224 × 224 and 1024 × 768 pixels, and read in
turns by `icm_jax.data.jpeg`, by simplejpeg (libjpeg-turbo, to RGB) and, where installed, by jpeglib
(coefficients through a file). Prints medians of images per second of one core's time.
"""

import argparse
import io
import pathlib
import tempfile
import time

import numpy as np
import simplejpeg
from PIL import Image

from icm_jax.data import jpeg

SIZES = ((224, 224), (1024, 768))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    paths = sorted(p for p in given.folder.rglob("*") if p.suffix in (".png", ".jpg"))[:24]
    if not paths:
        parser.error(f"no images in {given.folder}")
    readers = {"coefficients": jpeg.read_coefficients, "RGB (simplejpeg)": simplejpeg.decode_jpeg}
    try:
        import jpeglib
    except ImportError:
        print("jpeglib is not installed")
    else:
        file = tempfile.NamedTemporaryFile(suffix=".jpg")

        def through_a_file(data):
            pathlib.Path(file.name).write_bytes(data)
            return jpeglib.read_dct(file.name)

        readers["coefficients (jpeglib)"] = through_a_file
    for width, height in SIZES:
        files = [written(path, (width, height), given.quality) for path in paths]
        repeats = max(1, 8_000_000 // (width * height * len(files)))
        times = {name: [] for name in readers}
        for _ in range(given.rounds + 1):
            for name, read in readers.items():
                began = time.process_time()
                for _ in range(repeats):
                    for data in files:
                        read(data)
                times[name].append(time.process_time() - began)
        print(f"{width} × {height}, {np.mean([len(f) for f in files]):,.0f} bytes")
        rates = {n: repeats * len(files) / np.median(t[1:]) for n, t in times.items()}
        for name, rate in rates.items():
            print(f"  {name:24} {rate:8.0f} images/s  {rate / rates['RGB (simplejpeg)']:.2f} ×")


def written(path, size, quality: int) -> bytes:
    """An image file as JPEG of this size."""
    file = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(
            file, "JPEG", quality=quality
        )
    return file.getvalue()


if __name__ == "__main__":
    main()
