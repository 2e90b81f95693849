#!/usr/bin/env bash
# Trains a recipe on this machine, whatever it has, and goes on with the run when it is called again.
#
#   bash launch/laptop.sh [RECIPE] [SETTINGS]
#   bash launch/laptop.sh configs/quickstart.py --steps 200
#
# Variables, all optional:
#   RUN_DIR   folder of the run; runs/NAME_OF_THE_RECIPE
#   GPTJAX    the gptjax command; `gptjax` on PATH, or else the one in the checkout's .venv, made where there is none
#   PYTHON    interpreter that makes .venv and runs the supervisor; python3
# Ctrl-C saves and ends; the same command goes on. Exit codes: those of gptjax; 2 where something is missing.
set -euo pipefail
launch=$(cd "$(dirname "$0")" && pwd)

die() {
  echo "laptop.sh: $1" >&2
  exit 2
}

recipe=${1:-configs/quickstart.py}
[ $# -eq 0 ] || shift
[[ $recipe != -* ]] || die "RECIPE is missing (got $recipe); wanted e.g. bash launch/laptop.sh configs/quickstart.py $recipe ..."
python=${PYTHON:-python3}
command -v "$python" >/dev/null || die "$python is missing; wanted Python 3.11 or newer, e.g. PYTHON=python3.12"

read -ra gptjax <<<"${GPTJAX:-gptjax}"
if [ -z "${GPTJAX:-}" ] && ! command -v gptjax >/dev/null; then
  venv=$(dirname "$launch")/.venv
  if [ ! -x "$venv/bin/gptjax" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      die "$("$python" --version) is too old; wanted Python 3.11 or newer, e.g. PYTHON=python3.12"
    echo "laptop.sh: installing gptjax into $venv" >&2
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet -e "$(dirname "$launch")"
  fi
  gptjax=("$venv/bin/gptjax")
fi
name=$(basename "$recipe" .py)
exec "$python" "$launch/supervise.py" -- "${gptjax[@]}" pretrain "$recipe" --run-dir "${RUN_DIR:-runs/$name}" "$@"
