#!/usr/bin/env bash
# A stand-in for a mounted Quobyte volume: a FUSE file system of type fuse.quobyte, served by bindfs over a directory.
#
#   standin.sh up DIR MOUNTPOINT     mounts; both directories are made if missing; mounted already = success
#   standin.sh down MOUNTPOINT       unmounts and ends bindfs; not mounted = success
#
# While it is up, MOUNTPOINT.pid holds the pid of bindfs and MOUNTPOINT.log its output: kill -9 that pid for a pool that
# is gone (ENOTCONN), kill -STOP for one that hangs.
# Never add --enable-lock-forwarding: forwarded locks do not exclude two processes of one mount and stay after a kill.
set -euo pipefail

die() {
  printf 'standin.sh: %s\n' "$*" >&2
  exit 1
}

# Absolute and without links, by the parent only: the mount point itself may hang or be dead.
absolute() {
  local parent
  parent="$(cd "$(dirname "$1")" && pwd -P)" || die "$1: no such directory"
  printf '%s/%s\n' "${parent%/}" "$(basename "$1")"
}

# The mount table writes space, tab, newline and backslash as octal numbers; %b reads them.
mounted_here() {
  local line fields
  while read -r line; do
    read -r -a fields <<<"$line"
    [[ "$(printf '%b' "${fields[4]//\\/\\0}")" == "$1" ]] && return 0
  done </proc/self/mountinfo
  return 1
}

# True when the recorded process still is our bindfs, and not another one that got its number.
serves() {
  [[ -n "$1" ]] && tr '\0' '\n' 2>/dev/null <"/proc/$1/cmdline" | grep -qxF -- "$2"
}

# wait_until SECONDS COMMAND...
wait_until() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    sleep 0.02
  done
}

mounted_or_ended() { mounted_here "$1" || ! kill -0 "$2" 2>/dev/null; }
gone() { ! serves "$1" "$2"; }

up() {
  local dir mountpoint pid
  mkdir -p "$1"
  dir="$(cd "$1" && pwd -P)"
  mountpoint="$(absolute "$2")"
  if mounted_here "$mountpoint"; then
    grep -qF -- " - fuse.quobyte $dir " /proc/self/mountinfo || die "$mountpoint: something else is mounted there"
    return 0
  fi
  mkdir -p "$mountpoint"
  setsid bindfs -f -o subtype=quobyte,allow_other --multithreaded --forward-odirect=512 "$dir" "$mountpoint" \
    </dev/null >"$mountpoint.log" 2>&1 &
  pid=$!
  printf '%s\n' "$pid" >"$mountpoint.pid"
  wait_until 10 mounted_or_ended "$mountpoint" "$pid" || true
  if ! mounted_here "$mountpoint"; then
    kill -KILL "$pid" 2>/dev/null || true
    sed 's/^/standin.sh: bindfs: /' "$mountpoint.log" >&2
    rm -f "$mountpoint.pid" "$mountpoint.log"
    die "$mountpoint: not mounted after 10 s"
  fi
}

down() {
  local mountpoint pid
  mountpoint="$(absolute "$1")"
  pid="$(cat "$mountpoint.pid" 2>/dev/null || true)"
  # A stopped bindfs would make umount hang beyond any time limit, so it goes first; its mount is then dead, not busy.
  if serves "$pid" "$mountpoint" && grep -q '^State:[[:space:]]*[Tt]' "/proc/$pid/status"; then
    kill -KILL "$pid"
  fi
  while mounted_here "$mountpoint"; do
    timeout -k 1 10 umount -- "$mountpoint" 2>/dev/null && continue
    printf 'standin.sh: %s is busy: bindfs is killed and the mount detached\n' "$mountpoint" >&2
    serves "$pid" "$mountpoint" && kill -KILL "$pid"
    timeout -k 1 10 umount -l -- "$mountpoint" || die "$mountpoint: cannot be unmounted"
  done
  if ! wait_until 10 gone "$pid" "$mountpoint"; then
    kill -KILL "$pid" 2>/dev/null || true
    wait_until 5 gone "$pid" "$mountpoint" || die "$mountpoint: bindfs (pid $pid) does not end"
  fi
  rm -f "$mountpoint.pid" "$mountpoint.log"
}

case "${1:-} $#" in
  "up 3") up "$2" "$3" ;;
  "down 2") down "$2" ;;
  *) printf 'usage: standin.sh up DIR MOUNTPOINT | down MOUNTPOINT\n' >&2; exit 2 ;;
esac
