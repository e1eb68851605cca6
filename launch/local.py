#!/usr/bin/env python3
"""Trains with N processes on this machine, as a pod would: one `icm_jax.main` each.

    python launch/local.py --processes 4 --devices-per-process 2 -- --config=configs/omni_icm.py

What stands after `--` goes to every `python -m icm_jax.main`. Needs: icm_jax in this Python. With
--devices-per-process the processes share the CPU as so many virtual devices; without it each one
gets its part of the GPUs that are present.

If a process dies, the others are stopped within --grace seconds, and the same command resumes from
the newest checkpoint. SIGTERM and Ctrl-C are passed on: all save and stop at the same step. Output
of process 0 is shown; that of the others goes to files in --logs.
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time


def main() -> int:
    """Starts, watches and stops the processes; returns the first bad exit code."""
    options = parse(sys.argv[1:])
    logs = pathlib.Path(options.logs)
    logs.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    children: list[subprocess.Popen] = []
    asked = []

    def pass_on(number, _):
        asked.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    for index in range(options.processes):
        children.append(start(options, address, index, logs))
    pids = " ".join(str(child.pid) for child in children)
    print(f"{options.processes} processes: {pids}", file=sys.stderr, flush=True)
    code = watch(children, options.grace, asked)
    if code and not asked:
        print(f"logs: {logs}/process*.log; the same command resumes", file=sys.stderr)
    return code


def parse(arguments: list[str]) -> argparse.Namespace:
    """Own options, and what goes to `icm_jax.main`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="how many (default: 2)")
    parser.add_argument(
        "--devices-per-process", type=int, default=0, help="virtual CPU devices of each (0: GPUs)"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=60,
        help="seconds from a death or a SIGTERM to the end of all (60)",
    )
    parser.add_argument("--logs", default="runs/local", help="folder (default: runs/local)")
    parser.add_argument("rest", nargs="*", metavar="-- MAIN-ARGUMENT", help="for icm_jax.main")
    options = parser.parse_args(arguments)
    if options.processes < 1 or options.devices_per_process < 0:
        parser.error("there must be at least one process, and no negative number of devices")
    return options


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(options, address: str, index: int, logs: pathlib.Path) -> subprocess.Popen:
    """Process `index`, in a group of its own: a terminal's Ctrl-C reaches it through `pass_on`."""
    environment = dict(os.environ)
    count = options.devices_per_process
    if count:
        flag = f"--xla_force_host_platform_device_count={count}"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}".strip()
        environment["JAX_PLATFORMS"] = "cpu"
    else:
        environment.setdefault("JAX_LOCAL_DEVICE_IDS", own_gpus(index, options.processes))
    command = [sys.executable, "-m", "icm_jax.main", *options.rest, f"--coordinator={address}"]
    command += [f"--processes={options.processes}", f"--process={index}"]
    if index == 0:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    with (logs / f"process{index}.log").open("wb") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def own_gpus(index: int, processes: int) -> str:
    """The numbers of a process' GPUs, as "2,3", by `nvidia-smi`; they are dealt out evenly."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
        count = len(listed.stdout.splitlines())
    except (OSError, subprocess.CalledProcessError):
        count = 0
    if count < processes or count % processes:
        sys.exit(
            f"error: {count} GPUs cannot be dealt out to {processes} processes; give "
            "--devices-per-process to train on the CPU"
        )
    each = count // processes
    return ",".join(str(index * each + own) for own in range(each))


def watch(children: list[subprocess.Popen], grace: float, asked: list) -> int:
    """Waits until all have ended; after the first bad end the others have `grace` seconds."""
    bad, deadline = 0, 0.0
    while any(child.poll() is None for child in children):
        for index, child in enumerate(children):
            code = child.poll()
            if code and not bad:
                bad, deadline = code, time.monotonic() + grace
                how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
                if not asked:
                    print(f"process {index} ended {how}; stopping the others", file=sys.stderr)
                for other in children:
                    if other.poll() is None:
                        other.terminate()
        if asked and not deadline:
            deadline = time.monotonic() + grace
        if deadline and time.monotonic() > deadline:
            for child in children:
                if child.poll() is None:
                    child.kill()
        time.sleep(0.1)
    return bad or next((child.returncode for child in children if child.returncode), 0)


if __name__ == "__main__":
    sys.exit(main())
