"""Runs an experiment: every run of its config in order, then the report.

    python -m icm_jax.main --config=configs/omni_icm.py [--workdir=DIR] [--config.field=value]

The same command resumes what was interrupted and skips what is done.
"""

import importlib.util
import os
import pathlib
import sys
import warnings

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, e.g. configs/omni_icm.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results; default: runs/<name>.")
MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "report"], "train: everything; report: redo the report alone."
)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Start jax.distributed before all else.")


def main(argv: list[str]) -> None:
    """Parses, starts JAX, walks the runs; one line and exit code 2 on input that cannot be used."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    import jax

    from icm_jax.errors import IcmError

    if DISTRIBUTED.value:
        jax.distributed.initialize()
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    experiment = load_experiment(path.partition(".py:")[0].removesuffix(".py") + ".py")
    config = CONFIG.value
    workdir = pathlib.Path(WORKDIR.value or pathlib.Path("runs") / config.name).absolute()
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    try:
        run_experiment(experiment, config, workdir, train=MODE.value == "train")
    except IcmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_experiment(experiment, config, workdir: pathlib.Path, train: bool = True) -> pathlib.Path:
    """Trains and evaluates every run, then writes the report; returns its path."""
    import jax

    from icm_jax.checkpoint import write_json
    from icm_jax.evaluate import evaluate
    from icm_jax.optim import make_optimiser
    from icm_jax.report import write_report
    from icm_jax.train import train as train_run

    first = jax.process_index() == 0
    if first:
        print(f"work directory: {workdir}", flush=True)
    workdir.mkdir(parents=True, exist_ok=True)
    runs = experiment.runs(config)
    for run in runs:  # a wrong rate of the last run is said before the first is trained
        make_optimiser(run.optim, run.steps)
    for number, run in enumerate(runs, 1):
        if train:
            if first:
                print(f"[{number}/{len(runs)}] {run.name}", flush=True)
            train_run(run, workdir)
            evaluate(run, workdir)
    if first:
        write_json(workdir / "command.json", _command())
        report = write_report(config, runs, workdir)
        print(f"report: {report}", flush=True)
        return report
    return workdir


def load_experiment(path: str):
    """The config file as a module: it also has `runs(config)`."""
    spec = importlib.util.spec_from_file_location("experiment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _command() -> dict:
    arguments = [a if " " not in a else f"'{a}'" for a in sys.argv[1:]]
    return {"command": " ".join(["python -m icm_jax.main", *arguments])}


def cli() -> None:
    """Entry point: quiet libraries, then absl."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.set_verbosity(logging.ERROR)
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with one line in place of a traceback where a config field does not exist."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = " ".join(str(error.args[0] if error.args else error).split())
        print(f"error: the config cannot be read as asked: {text}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli()
