#!/usr/bin/env bash
# Writes requirements.lock: the pins of requirements.txt and the text encoder, everything that they need, and the SHA-256
# of each file, for every platform and Python that the package supports. PyTorch and what only it needs stay out: which
# build is right depends on the device, see packaging/image/install.sh.
#
#   packaging/lock.sh [UV]
set -euo pipefail

uv=${1:-uv}
cd "$(dirname "$0")/.."
wanted=$(mktemp)
trap 'rm -f "$wanted" "$wanted.lock"' EXIT
cat requirements.txt > "$wanted"
grep -v '^monailabel==' requirements-host.txt >> "$wanted"
apart=(--no-emit-package torch --no-emit-package triton)
"$uv" pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header "$wanted" --output-file "$wanted.lock"
while read -r name; do
  apart+=(--no-emit-package "$name")
done < <(grep -oE '^(nvidia|cuda)-[a-z0-9-]+' "$wanted.lock" | sort -u)
{
  echo "# Made by \`make lock\` from requirements.txt and requirements-host.txt."
  echo "# pip install --no-deps --require-hashes -r requirements.lock, after PyTorch."
  echo
} > requirements.lock.new
# What is locked already stays where it fits: only what changed is looked for anew.
[ -f requirements.lock ] && cp requirements.lock "$wanted.lock"
"$uv" pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header --generate-hashes "${apart[@]}" "$wanted" --output-file "$wanted.lock"
grep -vE '^( *)#' "$wanted.lock" >> requirements.lock.new
mv requirements.lock.new requirements.lock
