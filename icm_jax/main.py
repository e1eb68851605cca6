"""Runs an experiment: every run of its config in order, then the report.

    python -m icm_jax.main --config=configs/omni_icm.py [--workdir=DIR] [--config.field=value]

The same command resumes what was interrupted and skips what is done. With `--mode=code` it codes
the experiment's data set instead, and with `--mode=plan` it says what training needs.
"""

import os
import pathlib
import re
import sys
import traceback
import warnings
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from icm_jax.data.fields import FieldError
from icm_jax.engine.experiment import (
    check_names,
    config_of,
    load_experiment,
    named,
    runs_of,
    split_scale,
    telling,
)
from icm_jax.errors import IcmError

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, e.g. configs/omni_icm.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results; default: runs/<name>.")
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "report", "plan", "code"],
    "train: everything; report: redo the report alone; plan: compile the training steps for "
    "--topology and say what they need, without running them; code: code the data set with "
    "--codec into record files below the work directory, which --config.data.name=codes reads.",
)
CODEC = flags.DEFINE_string(
    "codec", None, "With --mode=code: codec file (.icmc); default: the model in the package."
)
QUALITY = flags.DEFINE_float("quality", None, "With --mode=code: 0 to 100; default 50.", 0, 100)
SPLIT = flags.DEFINE_list("split", ["train", "validation"], "With --mode=code: which to code.")
SHARDS = flags.DEFINE_integer(
    "shards",
    None,
    "With --mode=code: record files of a split; default: one for 1,000 images, 16 "
    "at least. As many processes can code at the same time.",
    1,
)
TOPOLOGY = flags.DEFINE_string(
    "topology",
    "local",
    "With --mode=plan: v5e:16x16, v5p:4x4x8, v6e:16x16 (a TPU slice by its chips; needs libtpu, "
    "no TPU), cpu:8 (virtual devices), or local, the devices that are present.",
)
ONLY = flags.DEFINE_string("only", "*", "With --mode=plan: runs whose names match, as '*/stage1'.")
COMPARE = flags.DEFINE_bool(
    "compare",
    False,
    "With --mode=plan: also with remat, with sharded parameters, and the largest "
    "batch that fits; several programs more, of a minute or more each.",
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Start jax.distributed first; on SLURM, TPU slices and GKE it finds the others by itself.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0 where nothing tells; implies --distributed."
)
PROCESSES = flags.DEFINE_integer("processes", None, "With --coordinator: how many there are.", 1)
PROCESS = flags.DEFINE_integer("process", None, "With --coordinator: the number of this one.", 0)
HEARTBEAT = 30  # seconds after which processes give up on one that does not answer
REPORTING = 3600  # seconds that the others wait at the end, while process 0 writes the report


MODES = {"only": "plan", "topology": "plan", "compare": "plan"}
MODES |= dict.fromkeys(("codec", "quality", "split", "shards"), "code")
"""Flags that belong to one mode."""


def main(argv: list[str]) -> None:
    """Parses, starts JAX, walks the runs; one line and exit code 2 on input that cannot be used."""
    import jax

    try:
        check_flags(argv)
        start(CONFIG.value)
    except IcmError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is saved", file=sys.stderr)
        _leave(130)
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        _leave(1)


def start(config: ml_collections.ConfigDict) -> None:
    """What the mode asks for. Raises: IcmError for all input that cannot be used."""
    path, _ = split_scale(config_flags.get_config_filename(flags.FLAGS["config"]))
    given = config_flags.get_override_values(flags.FLAGS["config"])
    for name in ("name", "data"):
        if not config.get(name):
            raise IcmError(f"the config {path} has no field {name}, or an empty one")
    try:
        start_mode(load_experiment(path), path, config, given)
    except FieldError as error:
        raise named(error, config, given) from error


def start_mode(experiment, path: str, config: ml_collections.ConfigDict, given) -> None:
    """See `start`; of a field that cannot be used, the name is the run's."""
    import jax

    from icm_jax.data import check_fields

    workdir = pathlib.Path(WORKDIR.value or pathlib.Path("runs") / config.name).absolute()
    for name in config:
        if (name == "data" or name.endswith("_data")) and config[name].name:
            fields = [f.partition(".")[2] for f in given if f.startswith(f"{name}.")]
            check_fields(config[name].name, fields)
    if MODE.value == "plan":
        plan_experiment(runs_of(experiment, path, config, given), workdir)
        return
    if DISTRIBUTED.value or COORDINATOR.value:
        start_distributed(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    if keeps_programs():
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the user keeps them together elsewhere
            jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if MODE.value == "code":
        code_data_set(config, workdir)
        return
    runs = runs_of(experiment, path, config, given)
    with telling(path):
        notes = experiment.notes(config) if hasattr(experiment, "notes") else []
    run_experiment(config, runs, workdir, notes, train=MODE.value == "train")


def check_flags(argv: list[str]) -> None:
    """Raises IcmError for arguments that are no flags, or flags that say nothing here."""
    if len(argv) > 1:
        raise IcmError(f"unexpected arguments: {' '.join(argv[1:])}; settings are --config.x=...")
    for name, mode in MODES.items():
        if flags.FLAGS[name].present and MODE.value != mode:
            raise IcmError(f"--{name} goes with --mode={mode} alone")
    count, number = PROCESSES.value, PROCESS.value
    if COORDINATOR.value is None and (count, number) != (None, None):
        raise IcmError("--processes and --process go with --coordinator=HOST:PORT, of process 0")
    if number is not None and count is not None and number >= count:
        raise IcmError(f"--process={number}: of {count} processes the last one is {count - 1}")


def keeps_programs() -> bool:
    """Whether compiled programs may be kept for the next start: those for CPUs crash or hang with
    JAX 0.5.3 when they are read again."""
    import jax

    return jax.default_backend() != "cpu" or jax.__version_info__ >= (0, 6)


def _leave(code: int) -> None:
    """Exits, and if there are other processes at once: JAX would wait for them for minutes, while
    they wait for this one in a collective operation."""
    import jax

    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def start_distributed(coordinator=None, processes=None, process=None) -> None:
    """jax.distributed, with peers that are missed after seconds instead of minutes.

    Raises: IcmError if the others cannot be reached.
    """
    import inspect

    import jax

    from icm_jax.errors import reason

    options: dict[str, Any] = {"coordinator_address": coordinator, "num_processes": processes}
    options |= {"process_id": process}
    timeouts = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": REPORTING}
    known = inspect.signature(jax.distributed.initialize).parameters  # JAX 0.5.3 has none of them
    options |= {name: value for name, value in timeouts.items() if name in known}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        raise IcmError(
            f"jax.distributed did not start: {reason(error)}. Start all processes together, "
            "with the same --coordinator and --processes, or on a cluster that JAX knows"
        ) from error


def plan_experiment(runs: list, workdir: pathlib.Path) -> list[dict]:
    """Compiles the step of every run for --topology; prints a table and writes plan.json."""
    from icm_jax.engine import plan
    from icm_jax.files import make_folder, write_json

    plan.prepare_host(TOPOLOGY.value)
    target = plan.open_target(TOPOLOGY.value)
    records, chosen = [], plan.distinct(runs, ONLY.value)
    if not chosen:
        some = ", ".join(run.name for run in runs[:4]) + (" ..." if runs[4:] else "")
        raise IcmError(f"--only={ONLY.value} is the name of no run; names are {some}")
    for run in chosen:
        print(f"compiling {run.name} for {target.name} ...", file=sys.stderr, flush=True)
        records += plan.compare(run, target) if COMPARE.value else [plan.plan(run, target)]
    make_folder(workdir)
    write_json(workdir / "plan.json", records)
    print(plan.describe(target, records))
    print(f"the same as JSON: {workdir / 'plan.json'}")
    return records


def code_data_set(config, workdir: pathlib.Path) -> pathlib.Path:
    """Codes the splits of the experiment's data set; returns the folder of the codes."""
    import jax

    from icm_jax.engine import codes

    folder = workdir / "codes"
    options: dict[str, Any] = dict(codec=CODEC.value, quality=QUALITY.value, count=SHARDS.value)
    for split in SPLIT.value:
        facts = codes.write(config.data, split, folder, **options)
        if jax.process_index() == 0:
            print(
                f"{split}: {facts['bytes']:,} bytes, {facts['bits_per_pixel']:.4f} bits per pixel; "
                f"images: {facts['images']:,}, shards: {facts['shards']:,}",
                flush=True,
            )
    if jax.process_index() == 0:
        print(f"read them with --config.data.name=codes --config.data.path={folder}", flush=True)
    return folder


def run_experiment(
    config, runs: list, workdir: pathlib.Path, notes=(), train: bool = True
) -> pathlib.Path:
    """Trains and evaluates every run, then writes the report; returns its path."""
    import jax

    from icm_jax.engine.train import train as train_run
    from icm_jax.files import make_folder, write_json
    from icm_jax.measure.evaluate import evaluate
    from icm_jax.measure.ready import check_ready
    from icm_jax.report.page import write_report

    first = jax.process_index() == 0
    if first:
        print(f"work directory: {workdir}", flush=True)
    make_folder(workdir)
    for note in notes if first else ():
        print(f"{config.name}: {note}", file=sys.stderr, flush=True)
    if train:  # what is wrong with the last run is said before the first is trained
        check_ready(runs, workdir)
    for number, run in enumerate(runs, 1):
        if train:
            if first:
                print(f"[{number}/{len(runs)}] {run.name}", flush=True)
            train_run(run, workdir)
            evaluate(run, workdir)
    if first:
        write_json(workdir / "command.json", _command())
        report = write_report(config, runs, workdir, notes)
        print(f"report: {report}", flush=True)
        return report
    return workdir


class ExperimentParser(flags.ArgumentParser):
    """`FILE.py` or `FILE.py:scale` to the config that stands there. The flag's own parser loads a
    file by itself, which then cannot import what lies beside it."""

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        """The locked config, which has all fields that the command names. Raises: IcmError."""
        config = config_of(argument)
        check_names(config, sys.argv)
        return config


flags.FLAGS["config"].parser = ExperimentParser()


def _command() -> dict:
    arguments = [a if " " not in a else f"'{a}'" for a in sys.argv[1:]]
    return {"command": " ".join(["python -m icm_jax.main", *arguments])}


def cli() -> None:
    """Entry point: quiet libraries, then absl."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.set_verbosity(logging.FATAL)  # what orbax tells of a full disk comes as an error, too
    sys.unraisablehook = _unraisable
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=_parse)


def _unraisable(problem: Any) -> None:
    """Where reading or writing one array fails, orbax closes its event loop, and each of the others
    complains of that."""
    if "Event loop is closed" not in str(problem.exc_value):
        sys.__unraisablehook__(problem)


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with one line in place of usage and tracebacks."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        text = str(error.__context__ if isinstance(error.__context__, IcmError) else error)
        text = re.sub(r"invalid literal for int\(\).*", "expected a whole number", text)
        text = re.sub(r"could not convert string to float.*", "expected a number", text)
        if CONFIG.name in text and "must have a value" in text:
            text = "name an experiment, as --config=configs/omni_icm.py"
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) else error)
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    cli()
