"""The `icm` command: image files in, .icm files out, and back.

    icm compress photo.png --quality 60     photo.icm
    icm decompress photo.icm                photo.png
    icm info photo.icm                      what the header says; needs no model
    icm detect photo.icm -m scalable.icmc   boxes, from the first layer of the file alone
    icm verify *.icm                        do they decode to what was encoded?
    icm eval FOLDER                         rate and distortion beside JPEG, WebP, ...
    icm completion bash                     a script that completes all this in the shell

Without --model they use the model in the package, which is for photographs. Several files are taken
at once; `-` is standard input or output. A file is written whole or not at all, and none is
overwritten without --force. Exit codes: 0 all done, 1 some files failed (each with one line on
standard error), 2 wrong usage.
"""

import argparse
import json
import os
import pathlib
import sys
from typing import Any

from icm_jax.errors import IcmError
from icm_jax.files import write_whole

QUALITIES = (0, 25, 50, 75, 100)


def main(arguments: list[str] | None = None) -> int:
    """Parses and runs one subcommand; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except IcmError as error:
        print(f"icm: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    import shtab

    parser = argparse.ArgumentParser(
        "icm",
        description="Learned image compression whose files decode to the encoder's latents, or say "
        "why not.",
        epilog="exit codes: 0 all done, 1 some files failed, 2 wrong usage",
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
    text = (
        "codec file (.icmc), or several: those of one rate make one curve; default: the model in "
    )
    _names_files(own.add_argument("--model", "-m", action="append", help=text + "the package"))
    own.add_argument("--quality", "-q", type=_quality, nargs="+", help=f"default: {QUALITIES}")
    own.add_argument("--out", "-o", help="folder for results.csv, results.json and curves.png")
    text = "other formats, as jpeg,webp,avif, or none; default: all that are installed and quick"
    own.add_argument("--rivals", type=_listed, help=text)
    text = "files of other formats at once, on all cores; 1: nothing beside, for times to trust"
    own.add_argument("--jobs", "-j", type=_count, default=os.cpu_count(), help=text)
    text = "bits per pixel, of JPEG and the others, between which BD-rates look (0.15 1.0)"
    own.add_argument("--rates", type=_rate, nargs=2, default=(0.15, 1.0), help=text)
    text = "print a completion script: put it where your shell looks for such"
    own = commands.add_parser("completion", help=text, description=text)
    own.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    own.set_defaults(run=lambda options: print(shtab.complete(parser, options.shell)) or 0)
    return parser


def _names_files(argument: Any) -> None:
    """A shell completes the argument with names of files; `shtab` looks for it in an attribute."""
    import shtab

    argument.complete = shtab.FILE


def _output_options(parser, text):
    _names_files(parser.add_argument("--out", "-o", help=text))
    parser.add_argument("--force", "-f", action="store_true", help="overwrite existing files")


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

    codec = _load(options.model)

    def one(data, name):
        return codec.compress(read_image(data, name), options.quality)

    return _each(options, one, ".icm")


def _decompress(options) -> int:
    from icm_jax.data.images import write_image

    codec = _load(options.model)
    out = options.out or ""
    suffix = ".png" if _is_folder(out) or out == "-" else pathlib.Path(out).suffix or ".png"

    def one(data, name):
        return write_image(codec.decompress(data, layers=options.layers), suffix)

    return _each(options, one, suffix)


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
        from icm_jax.codecs import model_file

        return model_file.describe(name)
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
    from icm_jax.codecs import model_file
    from icm_jax.data.images import write_image
    from icm_jax.measure import detect

    codec = _load(options.model)
    about = {} if options.model is None else model_file.describe(options.model)
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

    codec = _load(options.model)
    failed = 0
    for name in options.files:
        try:
            decode_latents(codec, _read(name), layers=options.layers)
            print(f"{name}: decodes to the latents that were encoded")
        except IcmError as error:
            failed += _failed(name, error)
    return int(failed > 0)


def _eval(options) -> int:
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
    if options.rivals is None:
        left = ", ".join(rate_distortion.SLOW)
        print(f"without {left}, minutes a picture; --rivals names what to measure", file=sys.stderr)
    out = pathlib.Path(options.out) if options.out else None
    return rate_distortion.compare(
        subjects, _pictures(options.files), _failed, jobs=options.jobs, rates=options.rates, out=out
    )


def _pictures(given: list[str]) -> list[str]:
    """Files as they are named, and the pictures in and below folders."""
    from icm_jax.data.sources import SUFFIXES

    paths = []
    for name in given:
        path = pathlib.Path(name)
        below = sorted(path.rglob("*")) if path.is_dir() else [path]
        paths += [str(p) for p in below if p == path or p.suffix.lower() in SUFFIXES]
    if not paths:
        raise IcmError(f"no images in {', '.join(given)}; expected files {SUFFIXES}")
    return paths


def _each(options, convert, suffix: str) -> int:
    """Converts every file; one line on standard error for each that fails."""
    import tqdm

    names, out = options.files, options.out
    many = len(names) > 1
    if many and out is not None and not _is_folder(out) and pathlib.Path(out).suffix:
        raise IcmError(f"{len(names)} files do not fit one output {out}; give -o a folder")
    if many and (out == "-" or "-" in names):
        raise IcmError("standard input and output take one file at a time")
    failed = 0
    for name in tqdm.tqdm(names, unit="file", disable=not many or not sys.stderr.isatty()):
        try:
            target = _target(name, out, suffix, many)
            if target is not None and target.exists() and not options.force:
                raise IcmError(f"{target} exists; --force overwrites it")
            content = convert(_read(name), name)
            if target is None:
                sys.stdout.buffer.write(content)
                sys.stdout.buffer.flush()
            else:
                write_whole(target, content)
        except IcmError as error:
            failed += _failed(name, error)
    return int(failed > 0)


def _target(name: str, out: str | None, suffix: str, many: bool) -> pathlib.Path | None:
    """Where the result of a file goes; None is standard output."""
    if out == "-" or (name == "-" and out is None):
        return None
    if out is None:
        return pathlib.Path(name).with_suffix(suffix)
    if many or _is_folder(out):
        stem = "stdin" if name == "-" else pathlib.Path(name).stem
        return pathlib.Path(out) / (stem + suffix)
    return pathlib.Path(out)


def _is_folder(out: str) -> bool:
    return bool(out) and (out.endswith(("/", os.sep)) or pathlib.Path(out).is_dir())


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


def _load(path: str | None):
    import icm_jax

    codec = icm_jax.load(path)
    if "image" not in codec.codec.outputs:
        outputs = ", ".join(codec.codec.outputs)
        raise IcmError(f"{path} codes no images: it gives {outputs}")
    return codec


def _failed(name: str, error: Exception) -> int:
    named = name in str(error).replace(":", " ").replace(";", " ").split()
    print(f"icm: {error}" if named else f"icm: {name}: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
