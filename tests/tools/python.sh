#!/usr/bin/env bash
# Prints the path of a Python of at least 3.11 that can make virtual environments: the machine's `python3`, or
# Debian's own /usr/bin/python3 where another, older one comes first in PATH.
set -euo pipefail

for candidate in python3 /usr/bin/python3; do
  # sys.executable, because the first in PATH may be a shim that chooses by directory.
  if path="$("$candidate" -c 'import ensurepip, sys, venv; print(sys.executable) if sys.version_info >= (3, 11) else sys.exit(1)' 2>/dev/null)"; then
    printf '%s\n' "$path"
    exit 0
  fi
done
printf 'python.sh: no Python of at least 3.11 with venv and ensurepip found (Debian 12 and 13: python3, python3-venv)\n' >&2
exit 1
