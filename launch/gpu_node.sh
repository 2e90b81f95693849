#!/usr/bin/env bash
# Trains a recipe on all NVIDIA GPUs of this machine, in one process, and goes on with the run when it is called again.
#
#   RUN_DIR=runs/gpt2 bash launch/gpu_node.sh RECIPE [SETTINGS]
#   RUN_DIR=runs/llama bash launch/gpu_node.sh configs/llama_1b.py --mesh.data 1 --mesh.fsdp 8
#
# Variables:
#   RUN_DIR                the folder of the run; wanted
#   PYTHON                 interpreter of the environment that holds gptjax[cuda12]; python3
#   CUDA_VISIBLE_DEVICES   the GPUs to use; all
#   XLA_FLAGS              flags for XLA, as they are; see docs/clusters.md for those worth a trial
#   XLA_PYTHON_CLIENT_MEM_FRACTION   share of each GPU's memory that jax takes; 0.92, since nobody else needs it here
# Ctrl-C saves and ends; the same command goes on. Exit codes: those of gptjax; 2 where something is missing.
set -euo pipefail
launch=$(cd "$(dirname "$0")" && pwd)

die() {
  echo "gpu_node.sh: $1" >&2
  exit 2
}

[ $# -ge 1 ] && [[ $1 != -* ]] || die "RECIPE is missing; wanted e.g. bash launch/gpu_node.sh configs/gpt2.py"
[ -n "${RUN_DIR:-}" ] || die "RUN_DIR is missing; wanted the folder of the run, e.g. RUN_DIR=runs/gpt2"
recipe=$1
shift
python=${PYTHON:-python3}
command -v "$python" >/dev/null || die "$python is missing; wanted the environment's interpreter, e.g. PYTHON=.venv/bin/python"
command -v nvidia-smi >/dev/null || die "nvidia-smi is missing; wanted NVIDIA GPUs and their driver (without: launch/laptop.sh)"

there=$(nvidia-smi --list-gpus | grep -c '^GPU') || true
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  there=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
fi
[ "$there" -gt 0 ] || die "nvidia-smi lists no GPU; see nvidia-smi"
seen=$("$python" -c 'import jax; print(sum(d.platform == "gpu" for d in jax.local_devices()))') ||
  die "jax does not start under $python; wanted pip install -e '.[cuda12]' in its environment"
[ "$seen" -eq "$there" ] || die "jax sees $seen of $there GPUs; wanted pip install -e '.[cuda12]' in the environment of $python"

export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
echo "gpu_node.sh: $there GPUs, run $RUN_DIR" >&2
exec "$python" "$launch/supervise.py" -- "$python" -m gptjax pretrain "$recipe" --run-dir "$RUN_DIR" "$@"
