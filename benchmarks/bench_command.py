"""How long a user of `icm` waits, against an older commit and Pillow's WebP and AVIF, in one run.

    python benchmarks/bench_command.py FOLDER [--commit f385979] [--copies 200] [--rounds 3]
    python benchmarks/bench_command.py FOLDER --model CODEC.icmc --photographs 8 --copies 0

FOLDER holds photographs; the first of each of its 15 most frequent sizes are taken, and 5 more. Of
a model with a detector `icm detect` is timed, too.
Every time is that of a fresh process, from start to end, as the shell sees it: 20 photographs and
one, compressed and decompressed, with an empty folder of kept programs and with a full one, then
copies of one photograph, whose rate is (copies - 1) / (time - time of one). The older commit stands
in a worktree in a temporary folder and has been run once before, so that what Numba keeps is there
for both. Rounds alternate between the two; medians count. Seconds of all cores together are given
beside those of the clock, with the computer's load: what else runs on it stretches the clock, most
of all where both cores would be used.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from PIL import Image, features

from icm_jax.coding import archive

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES, COUNT = 15, 20
RUNS = ("old", False), ("new", False), ("new", True)
"""(checkout, whether programs are kept from the run before)."""


def main():
    description = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=description)
    parser.add_argument("folder", type=pathlib.Path, help="of photographs")
    parser.add_argument("--commit", default="f385979", help="to compare with")
    parser.add_argument("--copies", type=int, default=200, help="of one photograph; 0: leave out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photographs", type=int, default=COUNT)
    parser.add_argument("--model", type=pathlib.Path, help="codec file; default: the package's")
    options = parser.parse_args()
    photographs = chosen(options.folder)[: options.photographs]
    print(f"{len(photographs)} photographs of {len(set(map(size_of, photographs)))} sizes")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before", flush=True)
    with tempfile.TemporaryDirectory() as name, worktree(options.commit) as old:
        work = pathlib.Path(name)
        bench = Bench(work, {"old": old, "new": ROOT}, options.model)
        bench.measure(f"{len(photographs)} photographs", photographs, options.rounds)
        bench.measure("one photograph", photographs[:1], options.rounds)
        if options.copies:
            copies = [work / f"copy{number}.jpg" for number in range(options.copies)]
            for path in copies:
                shutil.copy(photographs[0], path)
            bench.rate(copies, photographs[0])
        rivals(photographs)
    print(f"load {os.getloadavg()[0]:.1f} after")


def size_of(path: pathlib.Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def chosen(folder: pathlib.Path) -> list[pathlib.Path]:
    """One photograph of each of the most frequent sizes, then second ones."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    of_size = collections.defaultdict(list)
    for path in paths:
        of_size[size_of(path)].append(path)
    groups = sorted(of_size.values(), key=len, reverse=True)[:SIZES]
    found = [group[0] for group in groups]
    found += [path for group in groups for path in group[1:2]][: COUNT - len(found)]
    return found


@contextlib.contextmanager
def worktree(commit: str):
    """A checkout of a commit in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "old"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(folder), commit], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


class Bench:
    """Runs `icm` of several checkouts on the same files."""

    def __init__(self, work: pathlib.Path, trees: dict[str, pathlib.Path], model=None):
        self.work, self.trees = work, trees
        self.model = [] if model is None else ["-m", str(model.resolve())]
        finds = model is not None and "detector" in archive.describe(model)
        self.commands = ("compress", "decompress", *(("detect",) if finds else ()))
        (work / "programs").mkdir(mode=0o700)

    def run(self, tree: str, command: str, files, warm: bool) -> tuple[float, float]:
        """Seconds of one process, by the clock and of its cores; its output lies in
        work/TREE-COMMAND."""
        kept = self.work / "programs" / f"{tree}-{command}"
        if not warm:
            shutil.rmtree(kept, ignore_errors=True)
        out = self.work / f"{tree}-{command}"
        shutil.rmtree(out, ignore_errors=True)
        environment = dict(os.environ, PYTHONPATH=str(self.trees[tree]), ICM_CACHE_DIR=str(kept))
        call = [sys.executable, "-m", "icm_jax.cli", command, *map(str, files), *self.model]
        call += [] if command == "detect" else ["-o", f"{out}/"]
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        quiet = subprocess.DEVNULL
        subprocess.run(call, check=True, env=environment, cwd=self.trees[tree], stdout=quiet)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return time.perf_counter() - start, cores

    def each(self, tree: str, files, warm: bool) -> list[tuple[float, float]]:
        """Seconds to compress files, and of the other commands on what came out."""
        there = self.run(tree, "compress", files, warm)
        coded = sorted((self.work / f"{tree}-compress").iterdir())
        return [there, *(self.run(tree, command, coded, warm) for command in self.commands[1:])]

    def measure(self, title: str, files, rounds: int) -> None:
        for tree in self.trees:  # what Numba keeps
            self.each(tree, files[:1], warm=True)
        times = collections.defaultdict(list)
        for _ in range(rounds):
            for tree, warm in RUNS:
                times[tree, warm].append(self.each(tree, files, warm))
        print(f"\n{title}: seconds, and how many times as fast as the older commit")
        for at, command in enumerate(self.commands):
            for which, unit in enumerate(("clock", "cores")):
                before, empty, full = (
                    statistics.median(pair[at][which] for pair in times[key]) for key in RUNS
                )
                print(
                    f"  {command:10} {unit}  before {before:6.2f}   "
                    f"empty {empty:6.2f} ({before / empty:.1f} ×)   "
                    f"full {full:6.2f} ({before / full:.1f} ×)",
                    flush=True,
                )

    def rate(self, files, single) -> None:
        """Images per second of one size, starting left out."""
        rates = {}
        for tree in self.trees:
            one, many = self.each(tree, [single], True), self.each(tree, files, True)
            rates[tree] = [
                [(len(files) - 1) / (b - a) for a, b in zip(*pair, strict=True)]
                for pair in zip(one, many, strict=True)
            ]
        print(f"\n{len(files)} photographs of one size: a second")
        for at, command in enumerate(self.commands):
            for which, unit in enumerate(("clock", "cores")):
                before, now = (rates[tree][at][which] for tree in ("old", "new"))
                times = f"before {before:6.1f}   now {now:6.1f} ({now / before:.2f} ×)"
                print(f"  {command:10} {unit}  {times}")


def rivals(files) -> None:
    """Pillow in this process, one file after the other, reading and writing included."""
    print(f"\nPillow, {len(files)} photographs: seconds in one process that runs already")
    with tempfile.TemporaryDirectory() as name:
        for kind in ("WEBP", "AVIF"):
            if not features.check(kind.lower()):
                print(f"  {kind} is not in this Pillow")
                continue
            start = time.perf_counter()
            for path in files:
                with Image.open(path) as image:
                    image.convert("RGB").save(pathlib.Path(name) / f"{path.stem}.{kind}", kind)
            middle = time.perf_counter()
            for path in files:
                with Image.open(pathlib.Path(name) / f"{path.stem}.{kind}") as image:
                    image.save(pathlib.Path(name) / f"{path.stem}.png")
            end = time.perf_counter()
            print(f"  {kind:10}  encode {middle - start:6.2f}   decode {end - middle:6.2f}")


if __name__ == "__main__":
    main()
