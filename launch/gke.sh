#!/usr/bin/env bash
# Trains a recipe on Google Kubernetes Engine: fills in launch/gke_jobset.yaml and gives it to the cluster.
#
#   export IMAGE=REGISTRY/gptjax:1 RUN_DIR=gs://BUCKET/runs/mine
#   bash launch/gke.sh build && bash launch/gke.sh apply configs/llama_1b.py --mesh.fsdp 16 && bash launch/gke.sh logs
#
#   build                      builds the image of launch/Dockerfile as IMAGE and pushes it; EXTRA=cuda12,gcs for GPUs
#   render RECIPE [SETTINGS]   writes the filled-in JobSet to stdout
#   apply RECIPE [SETTINGS]    creates it in the cluster that kubectl talks to; again after delete, the run goes on
#   logs                       follows process 0
#   delete                     ends it; the pods save before they go
#
# The cluster needs JobSet (github.com/kubernetes-sigs/jobset), a node pool of the slice, and a service account that may
# write to the bucket. Variables: IMAGE and RUN_DIR, wanted; with defaults: NAME (gptjax), ACCELERATOR
# (tpu-v5-lite-podslice), TOPOLOGY (4x4), HOSTS in a slice (4), CHIPS of a host (4), SLICES (1; more are told to gptjax
# as --mesh.slices), EXTRA (tpu,gcs).
# Exit codes: 2 where something is missing; those of docker and kubectl.
set -euo pipefail
launch=$(cd "$(dirname "$0")" && pwd)

die() {
  echo "gke.sh: $1" >&2
  exit 2
}

render() {
  local text variable value
  [ -n "${RUN_DIR:-}" ] || die "RUN_DIR is missing; wanted a folder in a bucket, e.g. RUN_DIR=gs://BUCKET/runs/mine"
  [ $# -ge 1 ] && [[ $1 != -* ]] || die "RECIPE is missing; wanted e.g. bash launch/gke.sh apply configs/llama_1b.py"
  export RECIPE=$1 SETTINGS="${*:2}"
  [ "$SLICES" = 1 ] || SETTINGS="--mesh.slices $SLICES${SETTINGS:+ $SETTINGS}"
  text=$(<"$launch/gke_jobset.yaml")
  shopt -u patsub_replacement 2>/dev/null || true # or bash 5.2 takes & for what was found
  for variable in NAME IMAGE RUN_DIR RECIPE SETTINGS ACCELERATOR TOPOLOGY HOSTS CHIPS SLICES; do
    value=${!variable}
    [[ $value != *[\"\\]* && $value != *$'\n'* ]] || die "$variable is $value; wanted no quotes, backslashes or new lines"
    text=${text//"\${$variable}"/$value}
  done
  printf '%s\n' "$text"
}

export NAME=${NAME:-gptjax} ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice} TOPOLOGY=${TOPOLOGY:-4x4}
export HOSTS=${HOSTS:-4} CHIPS=${CHIPS:-4} SLICES=${SLICES:-1}
for variable in HOSTS CHIPS SLICES; do
  [[ ${!variable} =~ ^[1-9][0-9]*$ ]] || die "$variable is ${!variable}; wanted a number from 1 on"
done
step=${1:-}
[ $# -eq 0 ] || shift
case $step in
build | render | apply) [ -n "${IMAGE:-}" ] || die "IMAGE is missing; wanted a name in your registry, e.g. IMAGE=REGISTRY/gptjax:1" ;;
esac
case $step in
build)
  docker build --file "$launch/Dockerfile" --build-arg "EXTRA=${EXTRA-tpu,gcs}" --tag "$IMAGE" "$(dirname "$launch")"
  docker push "$IMAGE"
  ;;
render) render "$@" ;;
apply)
  rendered=$(render "$@")
  kubectl apply --filename - <<<"$rendered"
  ;;
logs) kubectl logs --follow "job/$NAME-workers-0" --container train ;;
delete) kubectl delete jobset "$NAME" ;;
*) die "got ${step:-no step}; wanted build, render, apply, logs or delete" ;;
esac
