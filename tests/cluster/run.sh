#!/usr/bin/env bash
# Runs a command with a fresh cluster, the driver installed in it, and ends the cluster afterwards. KEEP=1 leaves it up after a
# failure, for a look; then end it with `make cluster-down`.
set -euo pipefail
cluster="$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

leave() {
  local status=$?
  trap '' INT TERM HUP
  if ((status != 0)) && [[ -n "${KEEP:-}" ]]; then
    printf 'cluster: left up for a look; end it with: make cluster-down\n' >&2
  else
    "$cluster" down || status=1
  fi
  exit "$status"
}

# What is to be kept must not be cleared by whoever contains this run.
[[ -z "${KEEP:-}" ]] || unset CSI_QUOBYTE_RUN
# A run that was killed may have left one.
"$cluster" down
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
started=$SECONDS
"$cluster" up
printf 'cluster: up (%d s)\n' $((SECONDS - started))
started=$SECONDS
"$cluster" install
printf 'cluster: the driver is installed (%d s)\n' $((SECONDS - started))
"$cluster" run "$@" &
wait $!
