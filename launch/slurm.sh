#!/usr/bin/env bash
#SBATCH --job-name=icm_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=icm_jax-%j.log
#
# Trains on several nodes with GPUs under SLURM, one process per GPU.
#
#     sbatch --nodes=4 launch/slurm.sh --config=configs/omni_icm.py:imagenet --workdir=/shared/runs
#
# Needs: icm_jax with jax[cuda12] in the Python on PATH (or in $VENV) of every node, and a work
# directory that all nodes share. Options of sbatch go before the script's name; what follows it
# goes to every `python -m icm_jax.main`. JAX finds the other processes from SLURM's variables.
#
# Three minutes before the time limit, and when the job is pre-empted, every process gets SIGTERM:
# all save at the same step, and the job that SLURM starts again resumes there. If one process dies,
# the step ends for all of them.
set -euo pipefail

if [[ $# -eq 0 || "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
  sed -n '/^# Trains/,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  exit 0
fi
if [[ -z "${SLURM_JOB_ID:-}" ]]; then
  echo "error: this is not a SLURM job; start it with: sbatch $0 $*" >&2
  exit 2
fi
if [[ -n "${VENV:-}" ]]; then
  # shellcheck disable=SC1091
  source "$VENV/bin/activate"
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
exec srun --kill-on-bad-exit=1 --wait=60 --label \
  python -m icm_jax.main --distributed "$@"
