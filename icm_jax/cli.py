"""The `icm` command: image files in, .icm files out, and back.

    icm compress photo.png --quality 60     photo.icm
    icm decompress photo.icm                photo.png
    icm info photo.icm                      what the header says; needs no model
    icm detect photo.icm -m scalable.icmc   boxes, from the first layer of the file alone
    icm verify *.icm                        do they decode to what was encoded?
    icm eval FOLDER                         rate and distortion beside JPEG, WebP, ...
    icm completion bash                     a script that completes all this in the shell

Without --model they use the model in the package, which is for photographs. Several files are taken
at once, folders with --recursive; `-` is standard input or output. A file is written whole or not
at all, and none is overwritten without --force. Exit codes: 0 all done, 1 some files failed (each
with one line on standard error), 2 wrong usage. Compiled programs are kept in the user's cache
folder, or where ICM_CACHE_DIR says.
"""

import argparse
import atexit
import functools
import gc
import json
import os
import pathlib
import sys
from typing import Any

from icm_jax.errors import IcmError
from icm_jax.files import Room, cores, in_threads, listed, names_folder, target_of, write_whole

FILE: dict[Any, Any] = {}
"""`shtab.FILE`, once a script is to be printed: only there the package is imported."""
SHELLS = ("bash", "fish", "powershell", "tcsh", "zsh")
QUALITIES = (0, 25, 50, 75, 100)


def main(arguments: list[str] | None = None) -> int:
    """Parses and runs one subcommand; returns the exit code."""
    options = _parser().parse_args(arguments)
    gc.set_threshold(1 << 16, *gc.get_threshold()[1:])  # imports make much and drop little
    atexit.register(gc.freeze)  # else Python visits all of it once more before it ends
    try:
        return options.run(options)
    except IcmError as error:
        print(f"icm: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "icm",
        description="Learned image compression whose files decode to the encoder's latents, or say "
        "why not.",
        epilog="exit codes: 0 all done, 1 some files failed, 2 wrong usage. Compiled programs are "
        "kept in ICM_CACHE_DIR (~/.cache/icm_jax; up to 256 MiB); ICM_CACHE_DIR=off keeps none.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, text, files, model=True):
        own = commands.add_parser(name, help=text, description=text)
        own.set_defaults(run=run)
        _names_files(own.add_argument("files", nargs="+", metavar=files))
        if model:
            text = "codec file (.icmc); default: the model in the package"
            _names_files(own.add_argument("--model", "-m", help=text))
        return own

    own = command("compress", _compress, "image files to .icm files", "IMAGE")
    _output_options(own, "FILE.icm or folder; default: beside the image")
    own.add_argument(
        "--quality", "-q", type=_quality, help="0 to 100, real numbers too, higher is better (50)"
    )
    own = command("decompress", _decompress, ".icm files to images", "FILE.icm")
    _output_options(own, "image file (its suffix names the format) or folder; default: FILE.png")
    _layers_option(own)
    text = "what the headers of .icm files, or of .icmc codec files, say"
    own = command("info", _info, text, "FILE", model=False)
    own.add_argument("--json", action="store_true", help="one JSON object per file")
    own = command(
        "detect",
        _detect,
        "boxes of what .icm files show, one JSON object per file, read from the first layer alone",
        "FILE.icm",
    )
    own.add_argument("--least", type=_share, default=0.4, help="least score of a box (0.4)")
    text = "also write COCO results to FILE.json; an image's id is the file's name without suffix"
    _names_files(own.add_argument("--coco", metavar="FILE.json", help=text))
    text = "also draw the boxes into FOLDER/NAME.png: on the picture, or on grey where the file "
    own.add_argument("--draw", metavar="FOLDER", help=text + "ends after its first layer")
    own = command("verify", _verify, "decode .icm files and check their seals", "FILE.icm")
    _layers_option(own)
    own = command(
        "eval",
        _eval,
        "rate and distortion over images, beside JPEG, WebP and what else is installed",
        "FOLDER",
        model=False,
    )
    _eval_options(own)
    text = "print a completion script: put it where your shell looks for such"
    own = commands.add_parser("completion", help=text, description=text)
    own.add_argument("shell", choices=SHELLS)
    own.set_defaults(run=lambda options: _completion(parser, options.shell))
    return parser


def _names_files(argument: Any) -> None:
    """A shell completes the argument with names of files; `shtab` looks for it in an attribute."""
    argument.complete = FILE


def _output_options(parser, text):
    _names_files(parser.add_argument("--out", "-o", help=text))
    parser.add_argument("--force", "-f", action="store_true", help="overwrite existing files")
    text = "take the files in folders, too; below --out they keep their places"
    parser.add_argument("--recursive", "-r", action="store_true", help=text)
    text = f"files at the same time; default: the cores of this computer ({cores()})"
    parser.add_argument("--jobs", "-j", type=_count, default=cores(), metavar="N", help=text)


def _eval_options(parser):
    text = (
        "codec file (.icmc), or several: those of one rate make one curve; default: the package's"
    )
    _names_files(parser.add_argument("--model", "-m", action="append", help=text))
    parser.add_argument("--quality", "-q", type=_quality, nargs="+", help=f"default: {QUALITIES}")
    parser.add_argument("--out", "-o", help="folder for results.csv, results.json and curves.png")
    text = "other formats, as jpeg,webp,avif, or none; default: all that are installed and quick"
    parser.add_argument("--rivals", type=_listed, help=text)
    text = "files of other formats at once, on all cores; 1: nothing beside, for times to trust"
    parser.add_argument("--jobs", "-j", type=_count, default=cores(), help=text)
    text = "bits per pixel, of JPEG and the others, between which BD-rates look (0.15 1.0)"
    parser.add_argument("--rates", type=_rate, nargs=2, default=(0.15, 1.0), help=text)


def _completion(parser, shell: str) -> int:
    import shtab

    FILE.update(shtab.FILE)
    print(shtab.complete(parser, shell))
    return 0


def _layers_option(parser):
    parser.add_argument("--layers", type=int, metavar="N", help="read the first N layers only")


def _quality(text: str) -> float:
    """A quality on the command line."""
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not a quality from 0 to 100")
    return value


def _listed(text: str) -> list[str]:
    """Names between commas; none of "none"."""
    return [] if text == "none" else [name.strip() for name in text.split(",")]


def _count(text: str) -> int:
    """A number from 1 on the command line."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1")
    return int(text)


def _rate(text: str) -> float:
    """Bits per pixel on the command line."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a rate above 0")
    return value


def _share(text: str) -> float:
    """A number between 0 and 1 on the command line."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a score from 0 to 1")
    return value


def _compress(options) -> int:
    from icm_jax.data.images import read_image
    from icm_jax.data.sources import SUFFIXES

    codec, room = _load(options.model), Room()

    def one(data, name):
        image = read_image(data, name)
        with room.taken(image.shape[0] * image.shape[1]):
            return codec.compress(image, options.quality)

    return _each(options, one, SUFFIXES, ".icm")


def _decompress(options) -> int:
    from icm_jax.coding import container
    from icm_jax.data.images import write_image

    codec_of, room = _reader(options.model), Room()
    out = options.out or ""
    suffix = ".png" if names_folder(out) or out == "-" else pathlib.Path(out).suffix or ".png"

    def one(data, name):
        height, width = container.unpack(data, options.layers).header.shape
        with room.taken(height * width):
            image = codec_of(data).decompress(data, layers=options.layers)
        return write_image(image, suffix)

    return _each(options, one, (".icm",), suffix)


def _info(options) -> int:
    failed = 0
    for name in options.files:
        try:
            data = _read(name)
            facts = {"file": name, "bytes": len(data), **_facts(name, data)}
        except IcmError as error:
            failed += _failed(name, error)
            continue
        if options.json:
            print(json.dumps(facts))
        else:
            print("\n".join(f"{key:11} {_short(value)}" for key, value in facts.items()) + "\n")
    return int(failed > 0)


def _short(value, length: int = 500) -> str:
    """As a person reads it: the table of a detector takes kilobytes."""
    text = str(value)
    return text if len(text) <= length else f"{text[:length]} ... (--json has all)"


def _facts(name: str, data: bytes) -> dict:
    """What the header of an .icm file says, or model.json of a codec file."""
    from icm_jax.coding import container

    if name.endswith(".icmc"):
        from icm_jax.coding import archive

        return archive.describe(name)
    stream = container.unpack(data)
    header, (height, width) = stream.header, stream.header.shape
    return {
        "width": width,
        "height": height,
        "channels": 1 if header.grey else 3,
        "bpp": round(8 * len(data) / (height * width), 4),
        "quality": None if header.quality is None else header.quality / container.QUALITY_STEPS,
        "model": header.fingerprint.hex(),
        "version": container.VERSION,
        "layers": [[len(string) for string in layer.strings] for layer in stream.layers],
    }


def _detect(options) -> int:
    from icm_jax.coding import archive
    from icm_jax.data.images import write_image
    from icm_jax.measure import detect

    codec = _load(options.model)
    about = {} if options.model is None else archive.describe(options.model)
    find = detect.finder(codec, about.get("detector"), options.least)
    failed, results = 0, []
    for name in options.files:
        try:
            data = _read(name, layers=None if options.draw else 1)
            facts = {"file": name, **find(data)}
            stem = "stdin" if name == "-" else pathlib.Path(name).stem
            if options.draw:
                image = detect.drawn(detect.picture(codec, data), facts["boxes"])
                write_whole(pathlib.Path(options.draw) / f"{stem}.png", write_image(image, ".png"))
        except IcmError as error:
            failed += _failed(name, error)
            continue
        print(json.dumps(facts), flush=True)
        results += detect.coco_results(stem, facts["boxes"])
    if options.coco:
        write_whole(pathlib.Path(options.coco), json.dumps(results).encode())
    return int(failed > 0)


def _verify(options) -> int:
    from icm_jax.codecs.bitstream import decode_latents

    codec_of, failed = _reader(options.model), 0
    for name in options.files:
        try:
            data = _read(name)
            decode_latents(codec_of(data), data, layers=options.layers)
            print(f"{name}: decodes to the latents that were encoded")
        except IcmError as error:
            failed += _failed(name, error)
    return int(failed > 0)


def _eval(options) -> int:
    from icm_jax.data.sources import SUFFIXES
    from icm_jax.measure import rate_distortion

    if not options.rates[0] < options.rates[1]:
        raise IcmError("--rates takes the lower rate first")
    names = options.model or [None]
    models = {pathlib.Path(name or "icm").stem: _load(name) for name in names}
    if len(models) < len(names):
        raise IcmError("two models of one name cannot be told apart; rename one of the files")
    if options.quality and not any(codec.codec.qualities for codec in models.values()):
        raise IcmError("models of one rate take no --quality; leave it out")
    subjects = rate_distortion.ours(models, options.quality or QUALITIES)
    subjects += rate_distortion.rivals(options.rivals)
    paths = [file.name for file in listed(options.files, SUFFIXES, recursive=True)]
    more: Any = dict(rates=options.rates, out=options.out and pathlib.Path(options.out))
    return rate_distortion.compare(subjects, paths, _failed, jobs=options.jobs, **more)


def _each(options, convert, suffixes, suffix: str) -> int:
    """Converts every file, several at a time; one line on standard error for each that fails."""
    import tqdm

    files, out = listed(options.files, suffixes, options.recursive), options.out
    many = len(files) > 1 or any(file.place.parent.name for file in files)
    if many and out is not None and not names_folder(out) and pathlib.Path(out).suffix:
        raise IcmError(f"{len(files)} files do not fit one output {out}; give -o a folder")
    if many and (out == "-" or any(file.name == "-" for file in files)):
        raise IcmError("standard input and output take one file at a time")
    targets = [target_of(file, out, suffix, many) for file in files]
    first = {target: number for number, target in reversed(list(enumerate(targets)))}

    def one(number: int) -> None:
        file, target = files[number], targets[number]
        if target is not None and target.exists() and not options.force:
            raise IcmError(f"{target} exists; --force overwrites it")
        if first[target] != number:
            raise IcmError(f"{target} is what {files[first[target]].name} is written to")
        content = convert(_read(file.name), file.name)
        if target is None:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        else:
            write_whole(target, content)

    failed, quiet = 0, not many or not sys.stderr.isatty()
    with tqdm.tqdm(total=len(files), unit="file", disable=quiet) as bar:
        for number, error in in_threads(one, range(len(files)), min(options.jobs, len(files))):
            bar.update()
            failed += 0 if error is None else _failed(files[number].name, error)
    return int(failed > 0)


def _read(name: str, layers: int | None = None) -> bytes:
    """A file, or standard input; with `layers`, of an .icm file no more than so many take."""
    from icm_jax.coding import container

    def take(file):
        return file.read() if layers is None else container.receive(file, layers)

    if name == "-":
        return take(sys.stdin.buffer)
    try:
        with open(name, "rb") as file:
            return take(file)
    except OSError as error:
        raise IcmError(f"cannot read {name}: {error.strerror or error}") from error


def _load(path: str | os.PathLike | None):
    import icm_jax

    codec = icm_jax.load(path)
    if "image" not in codec.codec.outputs:
        raise IcmError(f"{path} codes no images: it gives {', '.join(codec.codec.outputs)}")
    return codec


def _reader(path: str | None):
    """An .icm file's bytes -> the codec to decode them with: that of the file at `path`, or of the
    models in the package the one that wrote them."""
    from icm_jax.coding import archive, container

    load = functools.cache(_load)
    named = path and load(path)
    return lambda data: named or load(archive.packaged(container.unpack(data, 1).header))


def _failed(name: str, error: Exception) -> int:
    named = name in str(error).replace(":", " ").replace(";", " ").split()
    print(f"icm: {error}" if named else f"icm: {name}: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
