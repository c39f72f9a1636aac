#!/usr/bin/env python3
"""Exit code 0 if the server in this container is ready to answer prompts, else 1 and why."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 5


def main() -> int:
    """Ask once."""
    url = f"http://127.0.0.1:{os.environ.get('PROGIDIFF_PORT', '8000')}/readyz"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S):
            return 0
    except urllib.error.HTTPError as err:
        why = f"{err.code} {err.read(2000).decode(errors='replace')}"
    except OSError as err:
        why = str(err)
    sys.stderr.write(f"{url}: {why}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
