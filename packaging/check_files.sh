#!/usr/bin/env bash
# What no interpreter of ours reads is checked by the tools of its own kind: `make check-files`.
set -euo pipefail
cd "$(dirname "$0")/.."

hadolint Dockerfile
shellcheck .ci/run packaging/*.sh packaging/image/*.sh
check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml packaging/compose.gpu.yaml
check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
check-jsonschema --quiet --builtin-schema vendor.dependabot .github/dependabot.yml
if command -v systemd-analyze > /dev/null; then
  # It looks for the program too, which only an installation has: the unit's own lines are what is checked.
  unit=$(mktemp --directory)
  sed 's|/opt/progidiff/bin/progidiff|/usr/bin/env|' packaging/systemd/progidiff.service > "$unit/progidiff.service"
  systemd-analyze verify "$unit/progidiff.service"
  rm -r "$unit"
fi
if command -v docker > /dev/null && docker compose version > /dev/null 2>&1; then
  docker compose --env-file packaging/compose.env --file compose.yaml config --no-interpolate --quiet
fi
echo "Dockerfile, compose files, scripts, unit and workflows are well-formed."
