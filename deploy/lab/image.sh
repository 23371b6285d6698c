#!/usr/bin/env bash
# Builds the container image from the Dockerfile, looks into it, and writes it to a file, with whichever of buildah,
# docker and podman is there (in this order; on a Debian machine without any, buildah is installed).
#
#   IMAGE       the image's name            default localhost/csi-quobyte:dev
#   BASE_IMAGE  what it is built on         default: a Debian trixie made here, so that no registry is needed
#   FRESH=1     takes nothing from earlier builds: newest Debian packages
#
# Leaves in $CSI_QUOBYTE_CACHE:  images/csi-quobyte.tar  the image, a docker-archive (docker load, ctr image import)
#                                images/build.log        what the build printed
#                                containers              storage of buildah or podman (docker has its own)
#
# Debian packages come from where this machine's apt gets them, and Python packages from where its pip does. Both ways
# are lent to the build as secrets: no address, proxy or certificate of this machine gets into a layer.
# One run at a time. A run that ends early, by a signal too, leaves neither containers nor mounts. The file is replaced
# in one step, and only by an image that passed the look; the name is given before, so that a bad one can be examined.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cache="${CSI_QUOBYTE_CACHE:-/var/cache/csi-quobyte}"
image="${IMAGE:-localhost/csi-quobyte:dev}"
base="${BASE_IMAGE:-}"
readonly suite=trixie
readonly ca_bundle=/etc/ssl/certs/ca-certificates.crt
# Generous: the network decides. A build takes about a minute.
readonly apt_timeout_s=900 base_timeout_s=900 build_timeout_s=1800 save_timeout_s=300 check_timeout_s=120

die() {
  printf 'image: %s\n' "$*" >&2
  exit 1
}

microseconds() { printf '%s' "${EPOCHREALTIME//[!0-9]/}"; }

# step NAME FUNCTION: runs one step and prints one line: its name, what was done ($done_text) and the seconds it took.
step() {
  local start tenths
  current="$1"
  done_text="done"
  start="$(microseconds)"
  "$2"
  tenths=$((($(microseconds) - start + 50000) / 100000))
  printf 'image: %-7s %s (%d.%d s)\n' "$1" "$done_text" $((tenths / 10)) $((tenths % 10))
}

# within SECONDS COMMAND...: runs a command with a time limit, its output in the log. In the background, because the
# shell hears a signal at once only in `wait`; `timeout` hands it on to all that the command started.
within() {
  local status=0
  timeout --kill-after 20 "$@" </dev/null >>"$log" 2>&1 &
  child=$!
  wait "$child" || status=$?
  child=""
  ((status != 124 && status != 137)) || printf 'not ended after %d s: %s\n' "$1" "${*:2}" >>"$log"
  return "$status"
}

# The engine's calls that only look something up or register it.
quick() { timeout --kill-after 20 60 "${cli[@]}" "$@" </dev/null; }

stop() {
  trap '' INT TERM HUP
  [[ -z "$child" ]] || { kill -TERM "$child" 2>/dev/null && wait "$child"; } || true
  exit "$1"
}

leave() {
  local status=$?
  trap '' INT TERM HUP
  # The storage is ours and locked, so every container in it is of this run or of one that was killed.
  [[ "$engine" != buildah ]] || quick rm --all >>"$log" 2>&1 || status=1
  rm -rf --one-file-system -- "$work" "$archive.tmp"
  if ((status != 0)); then
    tail -n 25 -- "$log" | cut -c 1-300 >&2 || true
    printf 'image: %s failed; the whole output is in %s\n' "$current" "$log" >&2
  fi
  exit "$status"
}

apt_get() { within "$apt_timeout_s" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@"; }

need() {
  ! command -v "$1" >/dev/null || return 0
  command -v apt-get >/dev/null || die "$1 is missing, and there is no apt-get to install it"
  [[ "$(id -u)" == 0 ]] || die "$1 is missing, and only root can install it"
  apt_get update && apt_get install -y --no-install-recommends "$1"
}

# A docker without its daemon is none.
pick_engine() {
  if command -v buildah >/dev/null; then
    engine=buildah
  elif command -v docker >/dev/null && timeout 20 docker info >/dev/null 2>&1; then
    engine=docker
  elif command -v podman >/dev/null; then
    engine=podman
  else
    need buildah
    engine=buildah
  fi
  cli=("$engine")
  if [[ "$engine" != docker ]]; then
    cli+=(--root "$cache/containers/root" --runroot "$cache/containers/runroot" --log-level error)
    export STORAGE_DRIVER="${STORAGE_DRIVER:-overlay}"
    # Without namespaces: builds also where this machine is itself a container.
    export BUILDAH_ISOLATION="${BUILDAH_ISOLATION:-chroot}"
    # Some packages of buildah come without a policy, and then even a local image is refused.
    [[ -e /etc/containers/policy.json ]] || policy=(--signature-policy "$work/policy.json")
    printf '{"default":[{"type":"insecureAcceptAnything"}]}\n' >"$work/policy.json"
  fi
  done_text="$("$engine" --version)"
}

# Print the sources of $suite at the archives from which apt gets this machine's own release: main, updates, security.
debian_sources() {
  . /etc/os-release
  apt-get indextargets --format '$(CREATED_BY) $(ORIGIN) $(COMPONENT) $(RELEASE) $(REPO_URI)' |
    awk -v own="${VERSION_CODENAME:-none}" -v suite="$suite" '
      $1 == "Packages" && $2 == "Debian" && $3 == "main" && $4 ~ "^(" own "|stable|oldstable)(-updates|-security)?$" {
        sub("^(" own "|stable|oldstable)", suite, $4); print "deb", $5, $4, "main" }' | sort -u
}

# How apt on this machine is told to fetch: proxies, and what a mirror with old signatures needs. Never whom to trust.
apt_settings() {
  apt-config dump --no-empty --format '%F "%v";%n' \
    Acquire::http Acquire::https Acquire::Check-Valid-Until Acquire::Check-Date
}

# The same for pip, whose settings are in its environment or in its files.
pip_settings() {
  local key name value
  printf '[global]\n'
  [[ ! -e "$ca_bundle" ]] || printf 'cert = /run/secrets/ca.crt\n'
  for key in index-url extra-index-url proxy trusted-host; do
    name="PIP_${key//-/_}"
    name="${name^^}"
    value="${!name:-$(timeout 20 python3 -m pip config get "global.$key" 2>/dev/null || true)}"
    [[ -z "$value" ]] || printf '%s = %s\n' "$key" "${value//$'\n'/ }"
  done
}

# private NAME FUNCTION: the function's output as a file that others cannot read: a proxy's address may hold a password.
private() { (umask 077 && "$2" >"$work/$1"); }

lend() { secrets+=(--secret "id=$1,src=$2"); }

lend_network() {
  local name
  private pip.conf pip_settings
  lend pip.conf "$work/pip.conf"
  [[ ! -e "$ca_bundle" ]] || lend ca.crt "$ca_bundle"
  if command -v apt-config >/dev/null; then
    private apt.conf apt_settings
    # The sources fit only a base made from them: another one brings its own.
    if [[ -z "$base" ]]; then
      printf 'Dir::Etc::SourceList "/run/secrets/sources.list";\n' >>"$work/apt.conf"
      lend sources.list "$work/sources.list"
    fi
    lend apt.conf "$work/apt.conf"
  fi
  for name in http_proxy https_proxy no_proxy; do
    [[ -z "${!name:-}" ]] || proxies+=(--build-arg "$name=${!name}")
  done
}

find_sources() {
  command -v apt-get >/dev/null || die "a base can only be made on a Debian machine: give BASE_IMAGE"
  debian_sources >"$work/sources.list"
  if [[ ! -s "$work/sources.list" && "$(id -u)" == 0 ]]; then
    # Without its lists apt does not know whose archives it has.
    apt_get update
    debian_sources >"$work/sources.list"
  fi
  [[ -s "$work/sources.list" ]] || die "apt on this machine has no Debian archive configured: give BASE_IMAGE"
}

# Like Debian's own slim image: minimal packages, no manuals. It names no archive, and nothing of this machine.
make_base() {
  local tag container
  tag="localhost/csi-quobyte-base:$({ declare -f make_base; cat "$work/sources.list"; } | sha256sum | cut -c 1-12)"
  done_text="$tag, already there"
  if [[ -n "${FRESH:-}" ]] || ! quick inspect --type image "$tag" >/dev/null 2>&1; then
    [[ "$(id -u)" == 0 ]] || die "only root can make a base: give BASE_IMAGE"
    need mmdebstrap
    private base-apt.conf apt_settings
    within "$base_timeout_s" env TMPDIR="$work" mmdebstrap --quiet --variant=minbase --aptopt="$work/base-apt.conf" \
      --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
      --dpkgopt='path-include=/usr/share/doc/*/copyright' --dpkgopt='path-exclude=/usr/share/locale/*' \
      --customize-hook='cd "$1/etc" && rm -f hostname resolv.conf' \
      --customize-hook='cd "$1/etc/apt" && rm -f sources.list sources.list.d/* apt.conf.d/99mmdebstrap' \
      "$suite" "$work/base.tar" "$work/sources.list"
    if [[ "$engine" == buildah ]]; then
      container="$(quick from "${policy[@]}" scratch)"
      within "$save_timeout_s" "${cli[@]}" add --quiet "$container" "$work/base.tar" /
      within "$save_timeout_s" "${cli[@]}" commit --quiet "${policy[@]}" --rm "$container" "$tag"
    else
      within "$save_timeout_s" "${cli[@]}" import "$work/base.tar" "$tag"
    fi
    rm -f -- "$work/base.tar"
    done_text="$tag, Debian $suite from this machine's archives"
  fi
  base_of_build="$tag"
}

revision() {
  git -C "$root" describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || printf unknown
}

build() {
  local version arguments=(--build-arg "BASE_IMAGE=$base_of_build")
  version="$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/csi_quobyte/__init__.py")"
  arguments+=(--build-arg "VERSION=$version" --build-arg "REVISION=$(revision)" "${proxies[@]}" "${secrets[@]}")
  [[ -z "${FRESH:-}" ]] || arguments+=(--no-cache)
  case "$engine" in
    docker) export DOCKER_BUILDKIT=1 ;;
    *)
      arguments+=("${policy[@]}" --network host --layers --force-rm)
      [[ -n "$base" ]] || arguments+=(--pull=never)
      ;;
  esac
  within "$build_timeout_s" "${cli[@]}" build "${arguments[@]}" --file "$root/Dockerfile" --tag "$image" "$root"
  done_text="$image, version $version"
}

# Runs in the image, as its own user: what has to be there runs, and what only builds need is not there.
readonly look='
  [ "$(id -u):$(id -g)" = 65532:65532 ] || { echo "runs as $(id)"; exit 1; }
  csi-quobyte --version
  qemu-img --version
  qemu-storage-daemon --version
  csi-quobyte doctor --json | python3 -c "
import json, sys
checks = {check[\"name\"]: check for check in json.load(sys.stdin)[\"checks\"]}
bad = [checks[name] for name in (\"qemu\", \"qemu for fuse\", \"commands\") if checks[name][\"status\"] != \"ok\"]
print(checks[\"qemu\"][\"detail\"])
sys.exit(f\"doctor: {bad}\" if bad else 0)"
  python3 -c "
import sys, importlib.util, grpc, qemu.qmp, csi_quobyte.pb.csi_pb2
assert sys.prefix == \"/opt/csi-quobyte\", sys.prefix
builders = \"pip\", \"setuptools\", \"hatchling\", \"grpc_tools\", \"pytest\"
found = [name for name in builders if importlib.util.find_spec(name)]
sys.exit(f\"in the image, but only builds need it: {found}\" if found else 0)"
  for program in pip pip3 gcc cc make git curl; do
    if command -v "$program"; then echo "$program does not belong into the image"; exit 1; fi
  done
  if find / -xdev -type f -perm /6000 2>/dev/null | grep .; then echo "setuid does not belong here"; exit 1; fi
  for path in /run/secrets/* /var/lib/apt/lists/*_Packages* /var/cache/apt/archives/*.deb /src /build /wheels; do
    if [ -e "$path" ]; then echo "$path does not belong into the image"; exit 1; fi
  done
'

look_into() {
  local container
  if [[ "$engine" == buildah ]]; then
    container="$(quick from "${policy[@]}" --pull=never "$image")"
    within "$check_timeout_s" "${cli[@]}" run "$container" -- /bin/sh -euc "$look"
    quick rm "$container" >>"$log"
  else
    within "$check_timeout_s" "${cli[@]}" run --rm --network none --entrypoint /bin/sh "$image" -euc "$look"
  fi
  done_text="QEMU $(sed -n 's/^qemu-img version \([^ ]*\).*/\1/p' "$log" | tail -n 1), user 65532, no build tools"
}

save() {
  rm -f -- "$archive.tmp"
  if [[ "$engine" == buildah ]]; then
    within "$save_timeout_s" "${cli[@]}" push --quiet "${policy[@]}" "$image" "docker-archive:$archive.tmp:$image"
  else
    within "$save_timeout_s" "${cli[@]}" save --output "$archive.tmp" "$image"
  fi
  mv -- "$archive.tmp" "$archive"
  done_text="$archive, $(($(stat -c %s "$archive") / 1000000)) MB (not compressed)"
}

(($# == 0)) || { printf 'usage: [IMAGE=NAME] [BASE_IMAGE=NAME] [FRESH=1] image.sh\n' >&2; exit 2; }
umask 022
mkdir -p "$cache/images" "$cache/containers"
exec {lock}>"$cache/image.lock"
flock -w 1800 "$lock" || die "another build has not ended in $cache"

archive="$cache/images/csi-quobyte.tar"
log="$cache/images/build.log"
work="$cache/image.work"
engine="" child="" current="start" base_of_build="$base"
cli=() policy=() secrets=() proxies=()
# The lock is held until the last process of a killed run has ended, so what it left can go.
rm -rf --one-file-system -- "$work" "$archive.tmp"
mkdir -m 0755 -- "$work"
: >"$log"
trap leave EXIT
trap 'stop 130' INT
trap 'stop 143' TERM HUP

step engine pick_engine
if [[ -z "$base" ]]; then
  find_sources
  step base make_base
fi
lend_network
step build build
step look look_into
step save save
