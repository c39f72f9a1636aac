#!/usr/bin/env bash
# The first stage of the image: the wheel, built from this folder, and an environment that holds it.
#
#   packaging/image/build.sh TARGET [cpu|cuda]
set -euo pipefail

if [ "$#" -lt 1 ]; then
  echo "Usage: build.sh TARGET [cpu|cuda]" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
source=$(cd "$here/../.." && pwd)
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"${PYTHON:-python3}" -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir "$wheels" "$source"
"$here/install.sh" "$1" "$wheels"/progidiff-*.whl "${2:-cpu}"
install -m 0644 "$here/healthcheck.py" "$1/healthcheck.py"
