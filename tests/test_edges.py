"""Uses and inputs at the edge: nothing is lost or altered without a word, nothing ends in a riddle.

What is deep (altered streams, full disks, killed processes) is in test_alterations and test_files.
"""

import io
import os
import pathlib
import pickle
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import icm_jax
from icm_jax import cli
from icm_jax.coding import archive, container
from icm_jax.data import images
from icm_jax.errors import IcmError
from icm_jax.files import in_threads
from icm_jax.measure import metrics

RNG = np.random.default_rng(11)
P3 = ((0.515, 0.241, -0.001), (0.292, 0.692, 0.042), (0.157, 0.067, 0.784))
"""Red, green and blue of Display P3, adapted to D50 (its published profile, in XYZ)."""
SRGB = ((0.436, 0.222, 0.014), (0.385, 0.717, 0.097), (0.143, 0.061, 0.714))


def profile(primaries=None, gamma: float = 2.2) -> bytes:
    """An ICC profile, version 2: of these colours, or grey (ICC.1:2001, 6.3)."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    number = lambda values: b"".join(struct.pack(">i", round(v * 65536)) for v in values)  # noqa: E731
    place = lambda values: b"XYZ " + bytes(4) + number(values)  # noqa: E731
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {b"desc": text, b"wtpt": place((0.9642, 1.0, 0.8249)), b"cprt": b"text" + bytes(5)}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        tags |= {n + b"XYZ": place(p) for n, p in zip((b"r", b"g", b"b"), primaries, strict=True)}
        tags |= {n + b"TRC": curve for n in (b"r", b"g", b"b")}
    at, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    kind = b"GRAY" if primaries is None else b"RGB "
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"none", 0x02400000, b"mntr", kind, b"XYZ ")
    head += struct.pack(">6H4s", 2020, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    head += number((0.9642, 1.0, 0.8249))
    return head.ljust(128, b"\0") + table + body


def stored(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat(colour, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (16, 16), colour)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_colours_of_another_profile_are_those_of_srgb(kind):
    """The green of sRGB has these numbers in Display P3 (both with a gamma of 2.2 here)."""
    options = {} if kind == "PNG" else {"quality": 100}
    options |= {"subsampling": 0} if kind == "JPEG" else {}
    green = flat((117, 251, 76))
    seen = images.read_rgb(stored(green, kind, icc_profile=profile(P3), **options), "x")
    wide = seen[8, 8].astype(int)
    assert wide[1] > 250 and wide[0] < 60 and wide[2] < 60, wide
    plain = images.read_rgb(stored(green, kind, **options), "x")
    assert np.abs(plain[8, 8].astype(int) - (117, 251, 76)).max() <= 3


def test_a_profile_of_srgb_changes_no_number_and_a_damaged_one_is_passed_over():
    from PIL import ImageCms

    noise = Image.fromarray(RNG.integers(0, 256, (20, 24, 3)).astype(np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for given in (srgb, b"junk" * 40, profile(None), srgb[:200]):
        seen = images.read_rgb(stored(noise, icc_profile=given), "x")
        np.testing.assert_array_equal(seen, np.asarray(noise))


def test_grey_with_a_profile_is_grey_in_srgb():
    """Linear light of a fifth is 124 in sRGB (IEC 61966-2-1)."""
    linear = profile(None, gamma=1.0)
    for kind in ("PNG", "JPEG"):
        seen = images.read_image(stored(flat(51, "L"), kind, icc_profile=linear), "x")
        assert seen.shape == (16, 16) and abs(int(seen[8, 8]) - 124) <= 2
    clear = Image.new("LA", (16, 16), (51, 255))
    assert abs(int(images.read_rgb(stored(clear, icc_profile=b"junk"), "x")[8, 8, 0]) - 51) <= 1


@pytest.mark.parametrize("mode", ["P", "HSV", "YCbCr", "LAB", "CMYK", "1", "LA", "RGBX", "PA"])
def test_an_image_of_pillow_is_coded_by_its_colours(mode):
    blob = np.zeros((24, 32, 3), np.uint8)
    blob[6:18, 8:24] = 255 if mode in ("1", "LA") else (200, 60, 30)
    colours = Image.fromarray(blob)
    if mode == "LAB":
        from PIL import ImageCms

        lab = ImageCms.createProfile("LAB")
        given = ImageCms.profileToProfile(colours, ImageCms.createProfile("sRGB"), lab, 0, "LAB")
    elif mode in ("P", "PA"):
        given = colours.quantize(4).convert(mode)
    else:
        given = colours.convert(mode)
    seen = images.pixels(given)
    seen = seen if seen.ndim == 3 else np.repeat(seen[..., None], 3, axis=2)
    assert np.abs(seen.astype(int) - blob).max() <= 40
    codec = icm_jax.load()
    assert codec.compress(given, 50) == codec.compress(images.pixels(given), 50)


@pytest.mark.parametrize("mode, kind", [("F", "TIFF"), ("I", "TIFF")])
def test_numbers_of_no_known_range_are_refused(tmp_path, capsys, mode, kind):
    picture = Image.fromarray(RNG.uniform(0, 1, (20, 24)).astype(np.float32)).convert(mode)
    path = tmp_path / "a.tif"
    path.write_bytes(stored(picture, kind))
    assert cli.main(["compress", str(path)]) == 1
    assert "of a range that nothing tells; scale them to 8 bits" in capsys.readouterr().err
    with pytest.raises(IcmError, match="scale them to 8 bits"):
        icm_jax.load().compress(picture)


def odd_exif() -> bytes:
    """A sound JPEG with EXIF in which the orientation is text and a pointer leads nowhere."""
    sound = stored(flat((9, 200, 30)), "JPEG", quality=95)
    entries = struct.pack("<HHHI4s", 2, 0x0112, 2, 2, b"6\0\0\0")
    entries += struct.pack("<HHII", 0x8769, 4, 1, 0xFFFFFFF0)
    body = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + bytes(4)
    return sound[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + sound[2:]


def test_one_odd_file_stops_no_other(tmp_path, capsys):
    good = stored(Image.fromarray(RNG.integers(0, 256, (20, 28, 3)).astype(np.uint8)))
    avif = stored(flat((1, 2, 3)), "AVIF")
    contents = {
        "a.png": good,
        "cut.png": good[: len(good) // 2],
        "short.avif": avif[: len(avif) // 2],
        "kind.dds": b"DDS " + struct.pack("<I", 124) + bytes(72) + b"ABCD" + bytes(60),
        "text.jpg": b"no image",
        "odd.jpg": odd_exif(),
        "z.png": good,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = [str(tmp_path / name) for name in contents]
    assert cli.main(["compress", *files, "-o", f"{tmp_path}/out/"]) == 1
    written = {path.stem for path in (tmp_path / "out").iterdir()}
    assert written == {"a", "odd", "z"}
    err = capsys.readouterr().err
    lines = [x for x in err.splitlines() if "cannot read the image" in x]
    assert len(lines) == 4, err
    for name in ("cut.png", "short.avif", "kind.dds", "text.jpg"):
        assert sum(name in line for line in lines) == 1


def test_what_is_not_kept_is_said_once(tmp_path, capsys):
    first, second = flat((200, 0, 0)), flat((0, 0, 200))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    first.save(tmp_path / "c.jpg", exif=exif)
    names = [str(tmp_path / name) for name in ("a.gif", "pages.tif", "c.jpg")]
    assert cli.main(["compress", *names]) == 0
    said = [x for x in capsys.readouterr().err.splitlines() if "not kept" in x]
    assert said == ["icm: not kept: EXIF (of 1), frames beyond the first (of 2)"]


@pytest.mark.parametrize(
    "suffix, least", [(".jpg", 38), (".webp", 99), (".avif", 38), (".jp2", 99)]
)
def test_decoded_pictures_are_written_with_next_to_no_loss(suffix, least):
    smooth = np.add.outer(np.arange(64), np.arange(80))[..., None] + np.array([0, 30, 60])
    picture = (smooth + RNG.normal(0, 3, smooth.shape)).clip(0, 255).astype(np.uint8)
    seen = images.read_rgb(images.write_image(picture, suffix), "x")
    assert metrics.psnr(picture, seen) > least or np.array_equal(picture, seen)


def test_python_says_what_it_takes():
    codec, picture = icm_jax.load(), RNG.integers(0, 256, (20, 28, 3)).astype(np.uint8)
    data = codec.compress(picture, 40)
    for quality in ("50", [50], np.array([50, 60]), float("nan"), 101, -1):
        with pytest.raises(IcmError, match="a number from 0 to 100"):
            codec.compress(picture, quality)
    for wrong in ("text", None, 7, io.BytesIO(data)):
        with pytest.raises(IcmError, match="a stream is bytes, not"):
            codec.decompress(wrong)
    for layers in ("x", 0, 2, 1.0):
        with pytest.raises(IcmError, match="layers asked for; the file has 1"):
            codec.decompress(data, layers=layers)
    with pytest.raises(IcmError, match=r"not float64 \[20, 28, 3\]"):
        codec.compress(picture / 255.0)
    with pytest.raises(IcmError, match=r"not uint8 \[20, 28, 4\]"):
        codec.compress(np.zeros((20, 28, 4), np.uint8))
    for same in (bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(codec.decompress(same), codec.decompress(data))
    assert len(repr(codec)) < 1000 and codec.fingerprint.hex() in repr(codec)


def test_a_codec_goes_to_another_process_and_codes_the_same():
    codec = icm_jax.load(archive.BOXED.with_name("photo-dd3a2b88.icmc"))
    again = pickle.loads(pickle.dumps(codec))
    picture = RNG.integers(0, 256, (20, 28, 3)).astype(np.uint8)
    assert again.fingerprint == codec.fingerprint
    assert again.compress(picture, 30) == codec.compress(picture, 30)


FORKED = """
import os, sys
import numpy as np
import icm_jax

codec, image = icm_jax.load(), np.zeros((20, 28, 3), np.uint8)
data = codec.compress(image, 40)
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
for use in (lambda: codec.compress(image, 40), lambda: codec.decompress(data)):
    try:
        use()
    except icm_jax.IcmError as error:
        print(error, flush=True)
os._exit(7)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_forked_process_is_told_and_does_not_wait():
    given = dict(os.environ, PYTHONPATH=str(pathlib.Path(icm_jax.__file__).parent.parent))
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=600)
    assert done.returncode == 7, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all('get_context("spawn")' in line for line in lines)


def test_results_of_detection_overwrite_nothing_unasked(tmp_path, capsys):
    (tmp_path / "found.json").write_text("mine")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.icm").write_bytes(b"icm")
    given = [str(tmp_path / folder / "x.icm") for folder in ("one", "two")]
    coco = ["--coco", str(tmp_path / "found.json")]
    assert cli.main(["detect", given[0], *coco]) == 2
    assert "found.json exists; --force overwrites it" in capsys.readouterr().err
    assert (tmp_path / "found.json").read_text() == "mine"
    assert cli.main(["detect", *given, "--draw", str(tmp_path / "d")]) == 2
    assert "two files of one name" in capsys.readouterr().err


COMMAND = """
import signal, sys
from icm_jax import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs of a script's shell ignore it
sys.exit(cli.main(sys.argv[1:]))
"""


def process(arguments, **options):
    given = dict(os.environ, PYTHONPATH=str(pathlib.Path(icm_jax.__file__).parent.parent))
    given |= options.pop("env", {})
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, env=given, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture
def stream(tmp_path):
    codec = icm_jax.load()
    path = tmp_path / "f.icm"
    path.write_bytes(codec.compress(RNG.integers(0, 256, (20, 28, 3)).astype(np.uint8), 40))
    return path


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_standard_output_that_is_full_or_gone_is_one_line(stream):
    with open("/dev/full", "w") as full:
        done = process(["info", stream], stdout=full)
        assert done.communicate()[1].splitlines() == [
            "icm: standard output: No space left on device"
        ]
    assert done.returncode == 1
    read, write = os.pipe()
    os.close(read)
    done = process(["info", stream], stdout=write)
    os.close(write)
    assert done.communicate()[1] == "" and done.returncode == 1


def test_a_terminal_of_seven_bits_loses_signs_alone(stream, tmp_path):
    name = tmp_path / "größe.icm"
    name.write_bytes(stream.read_bytes())
    more = {"PYTHONIOENCODING": "ascii:strict"}
    done = process(["info", name], stdout=subprocess.PIPE, env=more)
    out, errors = done.communicate()
    assert done.returncode == 0 and not errors and "width       28" in out


def test_ctrl_c_is_one_line_and_what_was_written_is_whole(tmp_path):
    count = 400
    noise = stored(Image.fromarray(RNG.integers(0, 256, (400, 400, 3)).astype(np.uint8)))
    for number in range(count):
        (tmp_path / f"{number:03}.png").write_bytes(noise)
    done = process(["compress", "-r", tmp_path, "-o", f"{tmp_path}/out/", "-j", "2"])
    while not list(tmp_path.glob("out/*.icm")) and done.poll() is None:
        time.sleep(0.05)
    done.send_signal(signal.SIGINT)
    errors = done.communicate()[1]
    assert done.returncode == 130, errors
    assert errors.splitlines()[-1] == "icm: stopped; what was written is whole"
    written = list((tmp_path / "out").iterdir())
    assert 0 < len(written) < count
    for path in written:
        container.unpack(path.read_bytes())


def test_threads_that_are_stopped_begin_nothing_more():
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.01)

    found = in_threads(work, range(1000), 2)
    next(found)
    found.close()
    assert len(begun) < 20


def test_info_reads_a_file_that_ends_after_a_layer(tmp_path, capsys):
    header = container.Header(b"abcd", (480, 640))
    whole = container.pack(header, [([b"first"], 1), ([b"second"], 2), ([b"third"], 3)])
    for layers in (1, 2, 3):
        path = tmp_path / f"{layers}.icm"
        path.write_bytes(container.prefix(whole, layers))
        facts = container.describe(path.read_bytes())
        assert len(facts["layers"]) == layers and facts.get("of", 3) == 3
        assert ("of" in facts) == (layers < 3)
        assert cli.main(["info", str(path)]) == 0
    path.write_bytes(whole[: len(whole) // 2])
    assert cli.main(["info", str(path)]) == 1


def test_the_version_is_there(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and icm_jax.__version__ in capsys.readouterr().out
