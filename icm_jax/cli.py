"""The `icm` command: image files in, .icm files out, and back.

    icm compress photo.png --quality 60     photo.icm
    icm decompress photo.icm                photo.png
    icm info photo.icm                      what the header says; needs no model
    icm detect photo.icm -m scalable.icmc   boxes, from the first layer of the file alone
    icm detect photo.jpg -m NAME.weights    boxes on an ordinary picture, here by Darknet's weights
    icm verify *.icm                        do they decode to what was encoded?
    icm eval FOLDER                         rate and distortion beside JPEG, WebP, ...
    icm import NAME.pth -o codec.icmc       a codec file of CompressAI's weights
    icm completion bash                     a script that completes all this in the shell

Without --model they use the model in the package, which is for photographs. Several files are taken
at once, folders with --recursive; `-` is standard input or output. A file is written whole or not
at all, and none is overwritten without --force. Exit codes: 0 all done, 1 some files failed (each
with one line on standard error), 2 wrong usage, 130 stopped by Ctrl-C. Compiled programs are kept
in the user's cache folder, or where ICM_CACHE_DIR says.
"""

import argparse
import atexit
import collections
import functools
import gc
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import icm_jax
from icm_jax.errors import IcmError
from icm_jax.files import (
    Room,
    cores,
    count,
    in_threads,
    listed,
    listing,
    names_folder,
    number,
    read,
    target_of,
    write_whole,
)

FILE: dict[Any, Any] = {}
"""`shtab.FILE`, once a script is to be printed: only there the package is imported."""
SHELLS = ("bash", "fish", "powershell", "tcsh", "zsh")
QUALITIES = (0, 25, 50, 75, 100)


def main(given: list[str] | None = None) -> int:
    """Parses and runs one subcommand; returns the exit code."""
    options = _parser().parse_args(given)
    gc.set_threshold(1 << 16, *gc.get_threshold()[1:])  # imports make much and drop little
    atexit.register(gc.freeze)  # else Python visits all of it once more before it ends
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a sign shows another
        getattr(stream, "reconfigure", dict)(errors="replace")
    try:
        code = options.run(options)
        print(end="", flush=True)
        return code
    except IcmError as error:
        print(f"icm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("icm: stopped; what was written is whole", file=sys.stderr)
        return 130
    except OSError as error:  # of standard output: its disk is full, or its reader has gone
        if not isinstance(error, BrokenPipeError):
            print(f"icm: standard output: {error.strerror or error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "icm",
        description="Learned image compression whose files decode to the encoder's latents, or say "
        "why not.",
        epilog="exit codes: 0 all done, 1 some files failed, 2 wrong usage, 130 stopped. Compiled "
        "programs are kept in ICM_CACHE_DIR (~/.cache/icm_jax; up to 256 MiB; off: nowhere).",
    )
    parser.add_argument("--version", action="version", version=f"icm_jax {icm_jax.__version__}")
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
    text = "0 to 100, real numbers too, higher is better (50)"
    own.add_argument("--quality", "-q", type=number("quality", 0, 100), help=text)
    _refining_options(own)
    own = command("decompress", _decompress, ".icm files to images", "FILE.icm")
    _output_options(own, "image file (its suffix names the format) or folder; default: FILE.png")
    _layers_option(own)
    text = "what the headers of .icm files, or of .icmc codec files, say"
    own = command("info", _info, text, "FILE", model=False)
    own.add_argument("--json", action="store_true", help="one JSON object per file")
    own = command(
        "detect",
        _detect,
        "boxes of what files show, one JSON object per file: of .icm files read from the first "
        "layer alone, of ordinary pictures by the whole detector of the same codec, or of Darknet "
        "(--model NAME.weights)",
        "FILE",
    )
    _detect_options(own)
    text = "decode .icm files and check that they give the latents that were encoded"
    own = command("verify", _verify, text, "FILE.icm")
    _layers_option(own)
    own = command(
        "eval",
        _eval,
        "rate and distortion over images, beside JPEG, WebP and what else is installed",
        "FOLDER",
        model=False,
    )
    _eval_options(own)
    text = "weights of CompressAI's image codecs to codec files, whose files are exact"
    _import_options(command("import", _import, text, "FILE", model=False))
    text = "print a completion script, to be put where your shell looks for them"
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
    parser.add_argument("--jobs", "-j", type=count, default=cores(), metavar="N", help=text)


def _refining_options(parser):
    text = "0 to 3, how long to search for the best file of each picture (0; with --for 2)"
    parser.add_argument("--effort", "-e", type=int, choices=range(4), help=text)
    text = "write what a detector needs, not what eyes do: one of Darknet's (NAME.cfg beside it) "
    text += "or, of a codec in layers, for its base, its own: --for machine"
    _names_files(parser.add_argument("--for", dest="reader", metavar="NAME.weights", help=text))


def _detect_options(parser):
    text = "least score of a box (0.4)"
    parser.add_argument("--least", type=number("score", 0, 1), default=0.4, help=text)
    text = "with --model NAME.weights, the network; default: one built in by that NAME, or NAME.cfg"
    _names_files(parser.add_argument("--cfg", metavar="FILE.cfg", default="", help=text))
    text = "with --model NAME.weights, a line for each class; default: COCO's, if there are 80"
    _names_files(parser.add_argument("--names", metavar="FILE", default="", help=text))
    text = "also write COCO results to FILE.json; an image's id is the file's name without suffix"
    _names_files(parser.add_argument("--coco", metavar="FILE.json", help=text))
    text = "also draw the boxes into FOLDER/NAME.png: on the picture, or on grey where the file "
    parser.add_argument("--draw", metavar="FOLDER", help=text + "ends after its first layer")
    parser.add_argument("--force", "-f", action="store_true", help="overwrite existing files")


def _eval_options(parser):
    text = "codec file (.icmc), or several, each after its own -m: a curve each, but one for all "
    text += "those of one rate; default: the model in the package"
    _names_files(parser.add_argument("--model", "-m", action="append", help=text))
    quality, text = number("quality", 0, 100), f"default: {' '.join(map(str, QUALITIES))}"
    parser.add_argument("--quality", "-q", type=quality, nargs="+", help=text)
    text = "as of icm compress, a curve for each given, as 0 2; default: 0"
    parser.add_argument("--effort", "-e", type=int, choices=range(4), nargs="+", help=text)
    parser.add_argument("--out", "-o", help="folder for results.csv, results.json and curves.png")
    text = "other formats, as jpeg,webp,avif, or none; default: all that are installed and quick"
    parser.add_argument("--rivals", type=listing, help=text)
    text = f"files of other formats coded at once; default: {cores()}; 1 for times to be trusted"
    parser.add_argument("--jobs", "-j", type=count, default=cores(), help=text)
    text = "bits per pixel between which BD-rates compare the curves; default: 0.15 1.0"
    parser.add_argument(
        "--rates", type=number("rate", 1e-6, 1e6), nargs=2, default=(0.15, 1.0), help=text
    )


def _import_options(parser):
    _output_options(parser, "FILE.icmc or folder; default: beside the weights")
    text = "what the file has to be, as mbt2018-mean; default: what its names and shapes say"
    parser.add_argument("--architecture", metavar="NAME", help=text)
    text = "pictures on which scales and means become integers, and their cost is counted"
    _names_files(parser.add_argument("--calibrate", metavar="FOLDER", help=text))


def _completion(parser, shell: str) -> int:
    import shtab

    FILE.update(shtab.FILE)
    print(shtab.complete(parser, shell))
    return 0


def _import(options) -> int:
    from icm_jax.weights import convert

    how = options.architecture, options.calibrate
    return _each(options, lambda _, name: convert.codec_file(name, *how), convert.SUFFIXES, ".icmc")


def _layers_option(parser):
    parser.add_argument("--layers", type=count, metavar="N", help="read the first N layers only")


def _compress(options) -> int:
    from icm_jax.data.images import not_kept, read_image
    from icm_jax.data.sources import SUFFIXES

    codec, room, lost = _load(options.model), Room(), []
    aim_of = _aims(options.reader, codec)
    effort = (2 if options.reader else 0) if options.effort is None else options.effort
    if options.reader and not effort:
        raise IcmError("--for takes an --effort above 0")

    def one(data, name):
        image = read_image(data, name)
        with room.taken(image.shape[0] * image.shape[1]):
            content = codec.compress(image, options.quality, effort, aim_of(image, options.quality))
        lost.extend(not_kept(data))
        return content

    code = _each(options, one, SUFFIXES, ".icm")
    if lost:
        counts = [f"{what} (of {n})" for what, n in sorted(collections.Counter(lost).items())]
        print(f"icm: not kept: {', '.join(counts)}", file=sys.stderr)
    return code


def _aims(reader: str | None, codec) -> Callable:
    """(image, quality) -> the aim that refining has."""
    if reader is None:
        return lambda image, quality: None
    from icm_jax.measure import aimed

    return aimed.at_own(codec) if reader == "machine" else aimed.at_weights(reader)


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
    from icm_jax.coding import container

    failed = 0
    for name in options.files:
        try:
            facts = {"file": name, "bytes": len(data := read(name)), **container.facts(name, data)}
        except IcmError as error:
            failed += _failed(name, error)
            continue
        if options.json:
            print(json.dumps(facts))
        else:
            print("\n".join(f"{k:11} {container.short(v)}" for k, v in facts.items()) + "\n")
    return int(failed > 0)


def _detect(options) -> int:
    from icm_jax.coding import archive
    from icm_jax.measure import darknet, detect

    written = detect.writes(options.files, options.draw, options.coco, options.force)
    codec, model = None, options.model
    if str(model).endswith(".weights"):
        find = darknet.finder(model, options.cfg, options.names, options.least)
    elif options.cfg or options.names:
        raise IcmError("--cfg and --names go with Darknet's weights: --model NAME.weights")
    else:
        codec = _load(model)
        about = {} if model is None else archive.describe(model)
        find = detect.finder(codec, about.get("detector"), options.least)
    return detect.each(find, codec, options.files, written, _failed)


def _verify(options) -> int:
    from icm_jax.codecs.bitstream import decode_latents

    codec_of, failed = _reader(options.model), 0
    for name in options.files:
        try:
            data = read(name)
            decode_latents(codec_of(data), data, layers=options.layers)
            print(f"{name}: decodes to the latents that were encoded")
        except IcmError as error:
            failed += _failed(name, error)
    return int(failed > 0)


def _eval(options) -> int:
    from icm_jax.data.sources import SUFFIXES
    from icm_jax.measure import rate_distortion

    names = options.model or [None]
    models = {pathlib.Path(name or "icm").stem: _load(name) for name in names}
    if len(models) < len(names):
        raise IcmError(f"{', '.join(options.model)}: two have one name; rename one of the files")
    if options.quality and not any(codec.codec.qualities for codec in models.values()):
        raise IcmError("models of one rate take no --quality; leave it out")
    given = options.quality or QUALITIES, options.effort or (0,)
    subjects = rate_distortion.ours(models, *given)
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
        raise IcmError(f"several files, or a folder, do not fit one output {out}; give -o a folder")
    if many and (out == "-" or any(file.name == "-" for file in files)):
        raise IcmError("standard input and output take one file at a time")
    targets = [target_of(file, out, suffix, many) for file in files]
    if None in targets and sys.stdout is None:
        raise IcmError("standard output is closed; give -o FILE")
    for target, several in collections.Counter(targets).items():
        if several > 1:
            raise IcmError(f"{several} files would be written to {target}; give them other names")

    def one(place: int) -> None:
        file, target = files[place], targets[place]
        if target is not None and target.exists() and not options.force:
            if target == pathlib.Path(file.name):
                expected = ", ".join(suffixes)
                raise IcmError(f"{target} would replace itself; expected {expected}, or -o FILE")
            raise IcmError(f"{target} exists; --force overwrites it")
        content = convert(read(file.name), file.name)
        if target is None:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        else:
            write_whole(target, content)

    failed, quiet = 0, not many or not sys.stderr.isatty()
    with tqdm.tqdm(total=len(files), unit="file", disable=quiet) as bar:
        for place, error in in_threads(one, range(len(files)), min(options.jobs, len(files))):
            bar.update()
            failed += 0 if error is None else _failed(files[place].name, error)
    return int(failed > 0)


def _load(path: str | os.PathLike | None):
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
