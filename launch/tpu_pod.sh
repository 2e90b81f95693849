#!/usr/bin/env bash
# Trains a recipe on a Cloud TPU slice of one or many hosts, got through the queue of queued resources.
#
#   export PROJECT=... ZONE=us-west4-a NAME=mine ACCELERATOR=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite RUN_DIR=gs://BUCKET/runs/mine
#   bash launch/tpu_pod.sh all configs/llama_1b.py --mesh.fsdp 16
#
# Steps, each of which can be called alone, in this order; `all` is all of them:
#   create                   asks for the slice; SPOT=1 for one that is cheaper and may be taken away
#   wait                     until the slice is there, asking every POLL seconds (30)
#   install                  copies this checkout to every worker and installs it with a Python of its own (uv)
#   run RECIPE [SETTINGS]    starts training on every worker under the supervisor, in the background
#   follow                   shows worker 0's log until training ends, and returns its exit code
#   delete                   gives the slice back: until then it costs money
# Variables, all wanted but the last two: PROJECT, ZONE, NAME (of the slice), ACCELERATOR, RUNTIME (its software version),
# RUN_DIR (in a bucket: the slice's disks go with it), SPOT, POLL.
# Exit codes: 2 where something is missing; 3 where the slice was not given, or was taken away; those of gptjax.
set -euo pipefail

die() {
  echo "tpu_pod.sh: $1" >&2
  exit "${2:-2}"
}

wanted() {
  local variable
  for variable in "$@"; do
    [ -n "${!variable:-}" ] || die "$variable is missing; wanted e.g. $variable=$(example "$variable")"
  done
}

example() {
  case $1 in
  PROJECT) echo my-project ;;
  ZONE) echo us-west4-a ;;
  NAME) echo mine ;;
  ACCELERATOR) echo v5litepod-16 ;;
  RUNTIME) echo v2-alpha-tpuv5-lite ;;
  RUN_DIR) echo gs://BUCKET/runs/mine ;;
  esac
}

queue() {
  gcloud compute tpus queued-resources "$1" "$NAME" --project "$PROJECT" --zone "$ZONE" "${@:2}"
}

on() {
  gcloud compute tpus tpu-vm ssh "$NAME" --project "$PROJECT" --zone "$ZONE" --worker "$1" --command "$2"
}

create() {
  wanted ACCELERATOR RUNTIME
  local spot=()
  [ -z "${SPOT:-}" ] || spot=(--spot)
  queue create --node-id "$NAME" --accelerator-type "$ACCELERATOR" --runtime-version "$RUNTIME" ${spot[@]+"${spot[@]}"}
}

wait_for() {
  local state before=
  while true; do
    state=$(queue describe --format 'value(state.state)')
    [ "$state" = "$before" ] || echo "tpu_pod.sh: $NAME is $state" >&2
    case $state in
    ACTIVE) return ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING) die "$NAME is $state; bash launch/tpu_pod.sh delete, then try again" 3 ;;
    esac
    before=$state
    sleep "${POLL:-30}"
  done
}

install() {
  local checkout archive
  checkout=$(cd "$(dirname "$0")/.." && pwd)
  archive=$(mktemp -d)
  tar -czf "$archive/gptjax.tar.gz" -C "$checkout" --exclude '*.pyc' pyproject.toml README.md LICENSE gptjax configs launch
  gcloud compute tpus tpu-vm scp "$archive/gptjax.tar.gz" "$NAME:" --project "$PROJECT" --zone "$ZONE" --worker all
  rm -r "$archive"
  # The slice's own Python may be older than 3.11; uv brings one without root.
  on all "mkdir -p gptjax && tar -xzf gptjax.tar.gz -C gptjax && cd gptjax &&
    python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv &&
    python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu,gcs]' && .venv/bin/gptjax --version"
}

run() {
  wanted RUN_DIR
  [[ $RUN_DIR == gs://* ]] || die "RUN_DIR is $RUN_DIR; wanted a folder in a bucket (gs://...): the slice's disks go with it"
  [ $# -ge 1 ] && [[ $1 != -* ]] || die "RECIPE is missing; wanted e.g. bash launch/tpu_pod.sh run configs/llama_1b.py"
  local recipe=$1 command
  shift
  command=$(printf '%q ' .venv/bin/python launch/supervise.py -- .venv/bin/gptjax pretrain "$recipe" --run-dir "$RUN_DIR" "$@")
  # In the background, so that it outlives this connection; its exit code goes to a file that `follow` waits for.
  on all "cd gptjax && rm -f code && { nohup bash -c '${command//\'/\'\\\'\'}; echo \$? >code' >>train.log 2>&1 </dev/null & }"
}

follow() {
  local code
  on 0 "cd gptjax && { tail -n +1 -F train.log & while [ ! -s code ]; do sleep 2; done; sleep 1; kill \$!; }" || true
  code=$(on 0 "cat gptjax/code") || die "$NAME does not answer; bash launch/tpu_pod.sh wait says whether it was taken away" 3
  echo "tpu_pod.sh: training ended with $code" >&2
  return "$code"
}

wanted PROJECT ZONE NAME
command -v gcloud >/dev/null || die "gcloud is missing; wanted Google's Cloud SDK"
step=${1:-}
[ $# -eq 0 ] || shift
case $step in
create | install | follow) "$step" ;;
wait) wait_for ;;
run) run "$@" ;;
delete) queue delete --force --quiet ;;
all)
  wanted RUN_DIR ACCELERATOR RUNTIME
  create
  trap 'echo "tpu_pod.sh: $NAME is not deleted and may cost money: bash launch/tpu_pod.sh delete" >&2' EXIT
  wait_for
  install
  run "$@"
  code=0
  follow || code=$?
  queue delete --force --quiet
  trap - EXIT
  exit "$code"
  ;;
*) die "got ${step:-no step}; wanted create, wait, install, run, follow, delete or all" ;;
esac
