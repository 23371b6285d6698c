#!/usr/bin/env bash
# Prints the path of a Python of at least 3.11 that can make virtual environments: the machine's `python3`, or
# Debian's own /usr/bin/python3 where another, older one comes first in PATH.
set -euo pipefail

# What the interpreter says of itself, because the first in PATH may be a shim that chooses by directory, or belong to
# a virtual environment (even to the one that is about to be made again): then the one below it is meant.
ask='import ensurepip, os, sys, venv
print(os.path.realpath(sys._base_executable)) if sys.version_info >= (3, 11) else sys.exit(1)'

for candidate in python3 /usr/bin/python3; do
  if path="$("$candidate" -c "$ask" 2>/dev/null)"; then
    printf '%s\n' "$path"
    exit 0
  fi
done
printf 'python.sh: no Python of at least 3.11 with venv and ensurepip found (Debian 12 and 13: python3, python3-venv)\n' >&2
exit 1
