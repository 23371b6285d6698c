#!/usr/bin/env bash
# Prepares a bare Debian 12 or 13 machine, as root, for `make demo` or `make test`. Everything but Debian's packages
# goes into one directory outside the tree, $CSI_QUOBYTE_CACHE (default /var/cache/csi-quobyte):
#   venv             Python packages of the locks (hashes checked) and this tree, editable
#   qemu             QEMU of Debian trixie, which need not be this machine's release
#   go, bin          for `test`: a Go if the machine has none that is new enough, csi-sanity, and helm for the chart
#   cluster          for `cluster`: Kubernetes and the CSI sidecars, built from source, and images of them
#   images           for `cluster`: the driver's image
#
# Usage: setup.sh [demo|test|cluster]     (default test; test includes demo, cluster includes test)
#
# What is there already is not done again: a stamp, written as the last act of a step, holds a hash of what the step
# was made from. So an interrupted run leaves no stamp and the next one repeats that step. One run at a time.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
export CSI_QUOBYTE_CACHE="${CSI_QUOBYTE_CACHE:-/var/cache/csi-quobyte}"
cache="$CSI_QUOBYTE_CACHE"
packages=(python3 python3-venv bindfs fuse3 xfsprogs e2fsprogs util-linux mount kmod mmdebstrap ca-certificates git make)
readonly test_packages=(fio)
readonly cluster_packages=(runc buildah containernetworking-plugins iptables nftables ipset conntrack socat ethtool iproute2
  busybox-static openssl procps uidmap)
readonly sanity_version="v5.6.0"

die() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

microseconds() { printf '%s' "${EPOCHREALTIME//[!0-9]/}"; }

# step NAME FUNCTION [ARGUMENT...]: runs one step and prints one line: its name, what was done and the seconds it took.
# The function says what was done in $done_text.
step() {
  local name="$1" start tenths
  shift
  current="$name"
  start="$(microseconds)"
  done_text="already there"
  "$@"
  tenths=$((($(microseconds) - start + 50000) / 100000))
  printf 'setup: %-11s %s (%d.%d s)\n' "$name" "$done_text" $((tenths / 10)) $((tenths % 10))
}

# is_stamped FILE VALUE; stamp FILE VALUE
is_stamped() { [[ -e "$1" && "$(<"$1")" == "$2" ]]; }
stamp() { printf '%s\n' "$2" >"$1.tmp" && mv "$1.tmp" "$1"; }

hash_of() { cat -- "$@" | sha256sum | cut -d ' ' -f 1; }

is_installed() { [[ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null)" == "ii " ]]; }

apt_get() { DEBIAN_FRONTEND=noninteractive timeout 900 apt-get -qq -o DPkg::Lock::Timeout=300 "$@" </dev/null >/dev/null; }

# Debian's lists are fetched at most once a day, and only if something has to be installed.
apt_update() {
  [[ -n "$(find "$cache/apt-update.stamp" -mmin -1440 2>/dev/null)" ]] && return 0
  apt_get update
  touch "$cache/apt-update.stamp"
}

apt_install() { apt_get install -y --no-install-recommends "$@"; }

debian_packages() {
  local package missing=()
  for package in "$@"; do
    is_installed "$package" || missing+=("$package")
  done
  ((${#missing[@]})) || return 0
  apt_update
  if ! apt_install "${missing[@]}"; then
    # The lists may be older than what the archive still has.
    rm -f "$cache/apt-update.stamp"
    apt_update
    apt_install "${missing[@]}"
  fi
  done_text="installed: ${missing[*]}"
}

# The packages of `test` include those of `demo`, so a venv made for `test` serves both. Other locks are installed into
# the venv that is there (a package that has left them stays): another tree may be running its tests in it. It is made
# anew for another Python, and when there is no stamp: then an installation into it was interrupted.
python_packages() {
  local python id lock locks=("$root/deploy/requirements.lock" "$root/deploy/build.lock") arguments=()
  python="$("$here/python.sh")"
  id="$python $("$python" -V)"
  is_stamped "$venv/packages.stamp" "$id $(hash_of "$root/tests/requirements.lock")" && return 0
  [[ "$profile" == demo ]] || locks=("$root/tests/requirements.lock")
  if [[ ! -e "$venv/packages.stamp" || "$(<"$venv/packages.stamp")" != "$id "* ]]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
  fi
  id="$id $(hash_of "${locks[@]}")"
  is_stamped "$venv/packages.stamp" "$id" && return 0
  for lock in "${locks[@]}"; do
    arguments+=(-r "$lock")
  done
  rm -f "$venv/packages.stamp"
  timeout 900 "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
    --require-hashes --only-binary :all: "${arguments[@]}"
  stamp "$venv/packages.stamp" "$id"
  done_text="$("$venv/bin/python" -V), packages of the locks installed"
}

# The stubs are generated into the tree, so the tree is asked for them, not only the stamp.
this_package() {
  local id
  id="$root $(<"$venv/packages.stamp") $(hash_of "$root"/pyproject.toml "$root"/proto/*.proto "$root"/proto/*.py "$root"/csi_quobyte/__init__.py)"
  [[ -e "$root/csi_quobyte/pb/csi_pb2.py" ]] && is_stamped "$venv/package.stamp" "$id" && return 0
  rm -f "$venv/package.stamp"
  timeout 300 "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --root-user-action ignore \
    --no-deps --no-build-isolation --no-index --editable "$root"
  stamp "$venv/package.stamp" "$id"
  done_text="installed, editable, stubs generated"
}

qemu() {
  local before=missing
  [[ ! -e "$cache/qemu/bin/qemu-img" ]] || before=there
  "$here/get-qemu.sh" "$cache/qemu" >"$cache/get-qemu.log" 2>&1 || {
    cat "$cache/get-qemu.log" >&2
    die "QEMU could not be set up"
  }
  [[ "$before" == there ]] || done_text="extracted"
  done_text+=", $("$cache/qemu/bin/qemu-img" --version | sed -n '1s/^qemu-img version \([^ ]*\).*/\1/p')"
}

go_toolchain() {
  go="$("$here/go.sh")"
  done_text="$go, $(GOTOOLCHAIN=local "$go" env GOVERSION)"
}

# Go checks what it downloads against its public checksum database; without cgo no C compiler is needed.
csi_sanity() {
  is_stamped "$cache/bin/csi-sanity.version" "$sanity_version" && [[ -x "$cache/bin/csi-sanity" ]] && return 0
  mkdir -p "$cache/bin"
  rm -rf "$cache/bin.tmp"
  GOTOOLCHAIN=local CGO_ENABLED=0 GOBIN="$cache/bin.tmp" timeout 900 \
    "$go" install "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@$sanity_version" >"$cache/csi-sanity.log" 2>&1 || {
    cat "$cache/csi-sanity.log" >&2
    die "csi-sanity could not be built"
  }
  mv "$cache/bin.tmp/csi-sanity" "$cache/bin/csi-sanity"
  rm -rf "$cache/bin.tmp"
  stamp "$cache/bin/csi-sanity.version" "$sanity_version"
  done_text="built, $sanity_version"
}

chart_tools() {
  "$here/helm.sh" >/dev/null
  done_text="helm and kubeconform are there"
}

# These two print a line for each thing that they make.
cluster_components() {
  "$root/tests/cluster/components.sh"
  done_text="every program is there"
}

cluster_images() {
  "$root/deploy/lab/image.sh"
  "$root/tests/cluster/images.sh"
  done_text="every image is there"
}

profile="${1:-test}"
case "$profile $#" in
  "demo 1" | "test 1" | "test 0" | "cluster 1") ;;
  *) printf 'usage: setup.sh [demo|test|cluster]\n' >&2; exit 2 ;;
esac
[[ "$(id -u)" == 0 ]] || die "must run as root: it installs Debian packages, and the driver mounts file systems"
command -v apt-get dpkg-query >/dev/null || die "made for Debian 12 and 13 (no apt-get here)"

umask 022
mkdir -p "$cache"
current="start"
trap 'status=$?; ((status == 0)) || printf "setup: %s failed; run it again once the reason above is gone\n" "$current" >&2' EXIT
venv="$cache/venv"
exec {lock}>"$cache/setup.lock"
if ! flock -n "$lock"; then
  printf 'setup: another setup is running in %s, waiting for it (up to 30 minutes)\n' "$cache"
  flock -w 1800 "$lock" || die "the other setup has not ended"
fi

case "$profile" in
  test) packages+=("${test_packages[@]}") ;;
  cluster) packages+=("${test_packages[@]}" "${cluster_packages[@]}") ;;
esac
step packages debian_packages "${packages[@]}"
step python python_packages
step csi-quobyte this_package
step qemu qemu
[[ "$profile" != demo ]] || exit 0
step go go_toolchain
step csi-sanity csi_sanity
step chart chart_tools
[[ "$profile" == cluster ]] || exit 0
step components cluster_components
step images cluster_images
