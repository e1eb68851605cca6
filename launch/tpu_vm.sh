#!/usr/bin/env bash
#
# Trains on a Cloud TPU slice: creates it (as a queued resource), installs, runs, on all workers.
#
#     launch/tpu_vm.sh create  --name icm --zone us-west4-a --type v5litepod-256 [--spot]
#     launch/tpu_vm.sh install --name icm --zone us-west4-a
#     launch/tpu_vm.sh run     --name icm --zone us-west4-a --bucket my-runs -- \
#         --config=configs/omni_icm.py:imagenet
#     launch/tpu_vm.sh delete  --name icm --zone us-west4-a
#
#     --name NAME      of the slice and of its queued resource
#     --zone ZONE      where it is
#     --project ID     default: that of gcloud's configuration
#     --type TYPE      accelerator type: v5litepod-256, v5p-256, v6e-256, ...
#     --runtime V      software of the machines; default: by the type
#     --spot           cheaper, and may be taken away at any time
#     --bucket NAME    Cloud Storage bucket for results; it is mounted with gcsfuse as ~/runs
#     --dry-run        prints the commands alone
#
# Needs: gcloud, logged in, and a quota for the slice; gcsfuse is on the TPU images. What stands
# after -- goes to every `python3 -m icm_jax.main`; JAX finds the other workers by itself. A slice
# that is taken away sends SIGTERM: all workers save at the same step. `create` and `run` again
# resume there. To know first whether a run fits and how fast it will be:
#
#     python -m icm_jax.main --config=... --mode=plan --topology=v5e:16x16
set -euo pipefail

usage() {
  sed -n '/^# Trains/,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
}

fail() {
  echo "error: $1; see $0 --help" >&2
  exit 2
}

call() {
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  if [[ "$dry" == no ]]; then
    "$@"
  fi
}

on_all() {
  call gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

action="${1:-}"
case "$action" in
  create | install | run | delete) shift ;;
  "" | -h | --help)
    usage
    exit 0
    ;;
  *) fail "there is no action '$action'" ;;
esac
name="" zone="" project="" type="" runtime="" bucket="" spot=no dry=no
while [[ $# -gt 0 ]]; do
  case "$1" in
    --spot) spot=yes ;;
    --dry-run) dry=yes ;;
    --)
      shift
      break
      ;;
    --name | --zone | --project | --type | --runtime | --bucket)
      [[ $# -ge 2 ]] || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    *) fail "there is no option '$1'" ;;
  esac
  shift
done
[[ -n "$name" && -n "$zone" ]] || fail "--name and --zone are needed"
where=("--zone=$zone")
[[ -z "$project" ]] || where+=("--project=$project")

case "$action" in
  create)
    [[ -n "$type" ]] || fail "create needs --type"
    if [[ -z "$runtime" ]]; then
      case "$type" in
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        *) fail "no runtime is known for '$type'; give --runtime" ;;
      esac
    fi
    options=("--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime")
    [[ "$spot" == no ]] || options+=(--spot)
    call gcloud compute tpus queued-resources create "$name" "${where[@]}" "${options[@]}"
    if [[ "$dry" == no ]]; then
      echo "waiting for $name; Ctrl-C leaves it in the queue" >&2
      while true; do
        state=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
          --format='value(state.state)')
        echo "$(date +%T) $state" >&2
        case "$state" in
          ACTIVE) break ;;
          FAILED | SUSPENDED) fail "$name is $state" ;;
        esac
        sleep 30
      done
    fi
    ;;
  install)
    root=$(cd "$(dirname "$0")/.." && pwd)
    archive=$(mktemp)
    trap 'rm -f "$archive"' EXIT
    call git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    call gcloud compute tpus tpu-vm scp "$archive" "$name:icm_jax.tar.gz" "${where[@]}" --worker=all
    on_all "mkdir -p icm_jax && tar -xzf icm_jax.tar.gz -C icm_jax && pip install './icm_jax[tpu]'"
    ;;
  run)
    [[ $# -gt 0 ]] || fail "run needs the arguments of icm_jax.main after --"
    mount=":"
    if [[ -n "$bucket" ]]; then
      mount="mkdir -p ~/runs && (mountpoint -q ~/runs || gcsfuse --implicit-dirs $bucket ~/runs)"
    fi
    printf -v arguments ' %q' "$@"
    on_all "$mount && cd icm_jax && python3 -m icm_jax.main --distributed --workdir=\$HOME/runs/$name$arguments"
    ;;
  delete)
    call gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
    ;;
esac
