"""Launchers: what can be said of them without a cluster, and the local one for real."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def run(*command, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=environment, timeout=60
    )


@pytest.fixture(scope="module")
def local():
    spec = importlib.util.spec_from_file_location("local", LAUNCH / "local.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shellcheck_finds_nothing():
    done = run(pathlib.Path(sys.executable).parent / "shellcheck", *SCRIPTS)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, LAUNCH / "local.py"], ids=lambda path: path.name)
def test_help_says_what_is_needed(script):
    done = run(sys.executable if script.suffix == ".py" else "bash", script, "--help")
    assert done.returncode == 0
    assert "icm_jax" in done.stdout and "--config=" in done.stdout and "Needs:" in done.stdout


def test_tpu_commands_are_those_of_gcloud():
    script = LAUNCH / "tpu_vm.sh"
    where = ("--name", "icm", "--zone", "us-west4-a", "--dry-run")
    done = run("bash", script, "create", *where, "--type", "v6e-256", "--spot")
    assert (
        done.returncode == 0
        and done.stderr.split()
        == (
            "+ gcloud compute tpus queued-resources create icm --zone=us-west4-a --node-id=icm "
            "--accelerator-type=v6e-256 --runtime-version=v2-alpha-tpuv6e --spot"
        ).split()
    )
    done = run("bash", script, "run", *where, "--", "--config=a.py", "--config.seeds=(0,)")
    command = done.stderr.partition("--command=")[2].replace("\\", "")
    assert "python3 -m icm_jax.main --distributed" in command and "--config=a.py" in command
    for arguments in (("create", *where), ("run", *where), ("fly",), ("create", "--name")):
        done = run("bash", script, *arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ")


def test_slurm_passes_all_arguments_on(tmp_path):
    script = LAUNCH / "slurm.sh"
    assert run("bash", script, "--config=a.py", SLURM_JOB_ID="").returncode == 2
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("bash", script, "--config=a b.py", SLURM_JOB_ID="1", PATH=path)
    assert done.stdout.splitlines()[-5:] == [
        "python", "-m", "icm_jax.main", "--distributed", "--config=a b.py"
    ]  # fmt: skip


def test_the_manifest_is_a_jobset_that_restarts_as_one():
    manifest = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["completions"] == spec["parallelism"] == int(sides[0]) * int(sides[1]) // chips
    assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert container["command"] == ["python", "-m", "icm_jax.main"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_one_death_ends_all_within_the_grace(local, capsys):
    stubborn = "import signal, time; signal.signal(15, lambda *_: None); print(1, flush=True)\n"
    codes = [stubborn + "time.sleep(100)", "import sys, time; time.sleep(0.5); sys.exit(7)"]
    codes.append("import time; time.sleep(100)")
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for code in codes
    ]
    children[0].stdout.readline()
    assert local.watch(children, 1.0, []) == 7
    ends = [child.wait() for child in children]
    assert ends == [-signal.SIGKILL, 7, -signal.SIGTERM]
    assert "process 1 ended with exit code 7" in capsys.readouterr().err
    for child in children:
        child.stdout.close()


def test_gpus_that_are_not_there_are_said_to_be_missing(local, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="0 GPUs cannot be dealt out to 2 processes"):
        local.own_gpus(0, 2)


def test_sigterm_to_the_launcher_saves_and_the_same_command_resumes(tmp_path):
    from test_main import ROOT, UNOPTIMISED

    command = [sys.executable, str(LAUNCH / "local.py"), "--processes", "2"]
    command += ["--devices-per-process", "1", "--logs", str(tmp_path / "logs"), "--"]
    command += [f"--config={ROOT / 'configs' / 'hyperprior.py'}:tiny"]
    command += [f"--workdir={tmp_path / 'work'}", f"--config.data.path={tmp_path / 'data'}"]
    command += ["--config.train.steps=40", "--config.train.log_every=1"]
    environment = {**os.environ, "XLA_FLAGS": UNOPTIMISED, "PYTHONPATH": str(ROOT)}

    def start():
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    process = start()
    deadline = time.monotonic() + 300
    logs = []
    while time.monotonic() < deadline and process.poll() is None and not logs:
        logs = list((tmp_path / "work").rglob("metrics.jsonl"))
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert "state is saved" in output, output[-3000:]
    assert "state is saved" in (tmp_path / "logs" / "process1.log").read_text()
    process = start()
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0 and "report: " in output, output[-3000:]
    steps = [json.loads(line)["step"] for line in logs[0].read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 40
