#!/usr/bin/env bash
# Installs the wheel with exactly the versions of requirements.lock into a new virtual environment.
#
#   packaging/image/install.sh TARGET WHEEL [cpu|cuda]
#
# TORCH overrides what is handed to `pip install` for PyTorch, which the lock leaves open: a build per CUDA or ROCm version.
set -euo pipefail

if [ "$#" -lt 2 ]; then
  echo "Usage: install.sh TARGET WHEEL [cpu|cuda]" >&2
  exit 2
fi
target=$1
wheel=$2
device=${3:-cpu}
source=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}

case $device in
  cpu) torch="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" ;;
  cuda) torch="torch==2.13.0" ;; # PyPI's build brings the CUDA libraries; only the driver comes from the machine
  *)
    echo "'$device' is no device. Say cpu or cuda." >&2
    exit 2
    ;;
esac
torch=${TORCH:-$torch}

"$python" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} was found, and 3.11, 3.12 or 3.13 is needed. Name one: PYTHON=/path/to/python3.11")'
"$python" -m venv "$target"
pip=("$target/bin/python" -m pip --disable-pip-version-check --quiet install)
# shellcheck disable=SC2086
"${pip[@]}" $torch
"${pip[@]}" --no-deps --require-hashes --requirement "$source/requirements.lock"
"${pip[@]}" --no-deps "$wheel"
"$target/bin/progidiff" --version
