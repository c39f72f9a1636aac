#!/usr/bin/env bash
# The second stage of the image: an account without rights, and the folders that it may write. Everything else may be
# mounted for reading only.
#
#   packaging/image/prepare.sh [ROOT]    ROOT: another place than / to make the folders in
set -euo pipefail

root=${1:-}
account=10001
if [ -z "$root" ]; then
  groupadd --gid "$account" progidiff
  useradd --uid "$account" --gid "$account" --home-dir /data/home --no-create-home --shell /usr/sbin/nologin progidiff
fi
install -d -m 0750 "$root/data" "$root/data/home" "$root/data/store" "$root/studies"
if [ "$(id -u)" = 0 ]; then
  chown -R "$account:$account" "$root/data" "$root/studies"
fi
