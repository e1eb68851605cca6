"""Forged files by the hundred thousand, as an attacker writes them: with valid checksums.

    python benchmarks/fuzz.py --files 100000 --seed 0 --out runs/fuzz

Half are .icm files and half are .icmc files, drawn from `tests/forge.py` by (seed, number), so that
any of them can be had again: `--first 4711 --files 1`. Each must end in an IcmError or an image,
within 2 s and 64 MiB beyond what the image takes. Three small codecs are the subjects and, for one
file in fifty, the model in the package. A worker process looks at them; where it dies or hangs,
that is a finding, and another goes on behind. Results go to OUT/results.jsonl, one line per file
that is not as it must be and one for each piece of work, so that the same command resumes.

Memory of a file is the peak of the process' resident memory while it is looked at, seen from what
it was before: Linux sets the peak back by a 5 in /proc/self/clear_refs. Of files whose arrays or
sizes call for programs that are not compiled yet, compiling is counted apart: it takes seconds and
stays in the process. Seconds are the processor's, of all threads, so that other processes count for
nothing. What images claim is limited to a megapixel (`bitstream.MAX_PIXELS`), as who
decodes files of strangers should; beyond, time and memory are those of such an image.
"""

import argparse
import collections
import gc
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SMALL = ("mean_scale_hyperprior", "factorised", "space_channel")
SECONDS, BYTES = 2.0, 64 << 20
PIECE, TOLD = 10_000, 250
"""Files of a worker, and of a line of results."""
HANGS = 120.0
"""Seconds without a word of a worker after which it hangs."""
PIXEL = 64
"""Bytes that an image takes per pixel while it is decoded in windows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/fuzz"))
    parser.add_argument("--worker", action="store_true", help="for itself")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.worker:
        work(options)
        return
    _subjects(options.out)
    lines = options.out / "results.jsonl"
    last = options.first + options.files
    while (at := _resumed(lines, options)) < last:
        _supervised(options, at, min(at + PIECE, last), lines)
    print(_summary(lines, options))


def _subjects(folder: pathlib.Path) -> None:
    """Files of the small codecs, frozen once; and a picture's stream by each."""
    from small import small_codec

    from icm_jax.codecs import model_file

    for name in SMALL:
        if not (folder / f"{name}.icmc").exists():
            model_file.save(folder / f"{name}.icmc", small_codec(name))


def _resumed(lines: pathlib.Path, options) -> int:
    """The number of the first file that nobody has looked at."""
    at = options.first
    for line in lines.read_text().splitlines() if lines.exists() else ():
        fact = json.loads(line)
        if fact["seed"] == options.seed and fact.get("first", -1) <= at:
            at = max(at, fact.get("last", at))
    return at


def _supervised(options, first: int, last: int, lines: pathlib.Path) -> None:
    """A piece of work in a process; where it ends early, up to and with the file it ended at."""
    command = [sys.executable, __file__, "--worker", "--first", str(first)]
    command += ["--files", str(last - first), "--seed", str(options.seed), "--out", options.out]
    beat = options.out / "at"
    beat.write_text(str(first))
    process = subprocess.Popen(command)
    while process.poll() is None:
        time.sleep(0.2)
        if time.time() - beat.stat().st_mtime > HANGS:
            process.kill()
            process.wait()
    if process.returncode:
        at, first = int(beat.read_text()), _resumed(lines, options)
        kind = "hang" if process.returncode == -9 else "crash"
        facts = dict(seed=options.seed, number=at, kind=kind, code=process.returncode)
        piece = dict(
            seed=options.seed, first=first, last=at + 1, counts={kind: 1, "not counted": at - first}
        )
        with lines.open("a") as out:
            out.write(json.dumps(facts) + "\n" + json.dumps(piece) + "\n")


def work(options) -> None:
    """Looks at files `first` ... `first + files - 1` and says what came of them."""
    from icm_jax.codecs import bitstream

    bitstream.MAX_PIXELS = 1 << 20
    begun = time.time() + 1800  # compiling may take its time
    os.utime(options.out / "at", (begun, begun))
    subjects = _loaded(options.out)
    last = options.first + options.files
    for first in range(options.first, last, TOLD):
        _piece(options, subjects, first, min(first + TOLD, last))


def _piece(options, subjects, first: int, last: int) -> None:
    """Looks at some files, and writes a line about them all."""
    from icm_jax.codecs import programs

    counts: collections.Counter = collections.Counter()
    slowest, largest, odd = (0.0, -1), (0, -1), []
    for number in range(first, last):
        (options.out / "at").write_text(str(number))
        made = len(programs._made)
        pixels, kind, seconds, size = _looked_at(number, options, subjects)
        if _beyond_bounds(pixels, seconds, size):  # or pages came back
            seconds, size = map(min, (seconds, size), _looked_at(number, options, subjects)[2:])
        compiled = len(programs._made) > made
        counts[f"{kind}, compiled" if compiled else kind] += 1
        beyond = size - PIXEL * pixels
        if not compiled:
            slowest, largest = max(slowest, (seconds, number)), max(largest, (beyond, number))
        late = not compiled and _beyond_bounds(pixels, seconds, size)
        if late or kind not in ("error", "image", "codec"):
            facts = dict(number=number, kind=kind, seconds=seconds, bytes=beyond)
            odd.append(dict(seed=options.seed, **facts))
    piece = dict(seed=options.seed, first=first, last=last, counts=counts)
    piece |= dict(slowest=slowest, largest=largest)
    with (options.out / "results.jsonl").open("a") as out:
        out.writelines(json.dumps(fact) + "\n" for fact in [*odd, piece])


def _loaded(folder: pathlib.Path) -> list:
    """(frozen codec, bytes of its file, a whole stream) of the small codecs and the package's."""
    import icm_jax
    from icm_jax.coding import archive, container

    rng, found = np.random.default_rng(5), []
    for path in [*(folder / f"{name}.icmc" for name in SMALL), archive.BOXED]:
        frozen = icm_jax.load(path)
        quality = 60 if frozen.codec.qualities else None
        for side in (40, 100, 200, 300, 600):  # programs for all windows there will be
            data = frozen.compress(rng.integers(0, 256, (side, side, 3)).astype(np.uint8), quality)
            frozen.decompress(data)
        data = frozen.compress(rng.integers(0, 256, (40, 56, 3)).astype(np.uint8), quality)
        frozen.decompress(data)
        grey = frozen.compress(rng.integers(0, 256, (40, 56)).astype(np.uint8), quality)
        frozen.decompress(grey)
        found.append((frozen, path.read_bytes(), container.unpack(data)))
    return found


def _beyond_bounds(pixels: int, seconds: float, size: int) -> bool:
    return seconds > SECONDS or size - PIXEL * pixels > BYTES


def _looked_at(number: int, options, subjects: list):
    """(pixels, what came of a forged file, seconds, bytes)."""
    import forge

    rng = np.random.default_rng((options.seed, number))
    boxed = rng.integers(50) == 0
    subject = subjects[-1] if boxed else subjects[rng.integers(len(SMALL))]
    is_stream, folder = number % 2 == 0, options.out
    frozen, data, whole = subject
    if not is_stream:
        forged = forge.forged_model(rng, data, [s.name for s in frozen.codec.segments])
        path = folder / "forged.icmc"
        path.write_bytes(forged)
        return _measured(lambda: _model(path, whole))
    if rng.integers(4):
        forged = forge.forged_stream(rng, frozen, whole)
    else:
        sides = tuple(int(side) for side in rng.choice(forge.SIDES, 2))
        steps = int(rng.integers(10_001)) if frozen.codec.qualities else None
        forged = forge.forged_symbols(rng, frozen, sides, steps)
    return _measured(lambda: _image(frozen, forged))


def _image(frozen, data: bytes) -> tuple[int, str]:
    image = frozen.decompress(data)
    return image.shape[0] * image.shape[1], "image"


def _model(path: pathlib.Path, whole) -> tuple[int, str]:
    """What `icm info` and `icm decompress` do with a codec file, the latter of a stream for it."""
    import forge

    import icm_jax
    from icm_jax.coding import archive

    archive.describe(path)
    frozen = icm_jax.load(path)
    if "image" not in frozen.codec.outputs:
        return 0, "codec"
    layers = [layer.strings for layer in whole.layers]
    quality = whole.header.quality if frozen.codec.qualities else None
    head = forge.head(frozen.fingerprint, whole.header.shape, quality, layers)
    data = forge.stream(head, layers, [np.zeros(0, "<i4")] * len(layers))
    return _image(frozen, forge.sealed(frozen, data))


def _measured(look) -> tuple[int, str, float, int]:
    """(pixels, kind, seconds, bytes by which resident memory rose in between)."""
    from icm_jax.errors import IcmError

    gc.collect(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, begin = _resident("VmRSS"), time.process_time()
    try:
        pixels, kind = look()
    except IcmError:
        pixels, kind = 0, "error"
    except Exception as error:  # whatever else it is: a finding
        pixels, kind = 0, f"{type(error).__name__}: {error}"[:300]
    seconds = time.process_time() - begin
    return pixels, kind, seconds, _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise OSError(f"no {field} in /proc/self/status")


def _summary(lines: pathlib.Path, options) -> str:
    facts = [json.loads(line) for line in lines.read_text().splitlines()]
    facts = [fact for fact in facts if fact["seed"] == options.seed]
    pieces = [fact for fact in facts if "first" in fact]
    counts: collections.Counter = collections.Counter()
    for piece in pieces:
        counts.update(piece["counts"])
    whole = [piece for piece in pieces if "slowest" in piece]
    slowest, largest = (max(piece[key] for piece in whole) for key in ("slowest", "largest"))
    said = [f"{sum(counts.values())} files: {dict(counts.most_common())}"]
    said.append(f"slowest {slowest[0]:.2f} s (file {slowest[1]})")
    said.append(f"largest {largest[0] / 2**20:.0f} MiB beyond the image (file {largest[1]})")
    odd = [fact for fact in facts if "number" in fact]
    said.append(f"{len(odd)} not as they must be: {odd[:20]}")
    return "\n".join(said)


if __name__ == "__main__":
    main()
