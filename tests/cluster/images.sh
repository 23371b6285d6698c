#!/usr/bin/env bash
# Packs the programs that components.sh has built into container images, one file each in $CSI_QUOBYTE_CACHE/cluster/images.
# No registry is asked: an image is made FROM scratch. The sidecars get the names that the chart gives them, so that the
# chart runs with its own defaults; busybox (Debian's busybox-static) gets the name that the examples give it.
#
# The driver's own image comes from deploy/lab/image.sh. What is there already and made of the same is not made again.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cache="${CSI_QUOBYTE_CACHE:-/var/cache/csi-quobyte}"
bin="$cache/cluster/bin"
images="$cache/cluster/images"
readonly sidecars_prefix=registry.k8s.io/sig-storage timeout_s=300

die() {
  printf 'images: %s\n' "$*" >&2
  exit 1
}

within() {
  timeout --kill-after 20 "$timeout_s" "$@" </dev/null >>"$images/build.log" 2>&1 || {
    tail -n 20 "$images/build.log" >&2
    die "failed: $*"
  }
}

buildah() {
  within "$(type -P buildah)" --root "$cache/containers/root" --runroot "$cache/containers/runroot" --log-level error "$@"
}

# save NAME FILE-STEM DOCKERFILE: builds $work and writes the image to a file.
save() {
  local name="$1" file="$images/$2.tar"
  cp "$here/images/$3" "$work/Dockerfile"
  buildah build --signature-policy "$images/policy.json" --pull=never --quiet --build-arg BASE_IMAGE=localhost/csi-quobyte:dev \
    --tag "$name" "$work"
  rm -f "$file.tmp"
  buildah push --quiet --signature-policy "$images/policy.json" "$name" "docker-archive:$file.tmp:$name"
  mv "$file.tmp" "$file"
  printf '%s\n' "$id" >"$file.stamp"
  printf 'images: %s (%d MB)\n' "$name" $(($(stat -c %s "$file") / 1000000))
}

is_there() { [[ -e "$images/$1.tar" && -e "$images/$1.tar.stamp" && "$(<"$images/$1.tar.stamp")" == "$id" ]]; }

fresh_work() {
  rm -rf "$work"
  mkdir -p "$work"
}

# program NAME PROGRAM
program() {
  id="$1 $(cat "$bin/$2" "$here/images/Dockerfile.program" | sha256sum | cut -c 1-16)"
  is_there "$2" && return 0
  fresh_work
  cp "$bin/$2" "$work/program"
  save "$1" "$2" Dockerfile.program
}

busybox() {
  local applet
  id="$(cat /bin/busybox "$here/images/Dockerfile.busybox" | sha256sum | cut -c 1-16)"
  is_there busybox && return 0
  fresh_work
  mkdir -p "$work/root"/{bin,tmp,etc,proc,sys,dev,root}
  cp /bin/busybox "$work/root/bin/busybox"
  for applet in $(/bin/busybox --list); do
    [[ -e "$work/root/bin/$applet" ]] || ln -s busybox "$work/root/bin/$applet"
  done
  printf 'root:x:0:0:root:/root:/bin/sh\n' >"$work/root/etc/passwd"
  save docker.io/library/busybox:stable busybox Dockerfile.busybox
}

# tag NAME: the version of a sidecar as the chart has it. The unit tests compare it with the go.mod files.
tag() { awk -v name="  $1:" '$0 == name { found = 1 } found && $1 == "tag:" { print $2; exit }' "$here/../../charts/csi-quobyte/values.yaml"; }

# The driver that cluster-bench compares with lies on the image of ours: it needs the same tools.
reference() {
  id="$(cat "$bin/reference" "$here/reference/Dockerfile.reference" "$cache/images/csi-quobyte.tar" | sha256sum | cut -c 1-16)"
  is_there bench/reference && return 0
  fresh_work
  cp "$bin/reference" "$work/reference"
  save localhost/csi-quobyte-reference:dev bench/reference ../reference/Dockerfile.reference
}

umask 022
mkdir -p "$images/bench" "$cache/containers"
# buildah's storage and its lock are those of image.sh.
exec {lock}>"$cache/image.lock"
flock -w 1800 "$lock" || die "another build has not ended in $cache"
export STORAGE_DRIVER="${STORAGE_DRIVER:-overlay}" BUILDAH_ISOLATION="${BUILDAH_ISOLATION:-chroot}"
work="$cache/cluster/images.work"
trap 'rm -rf "$work"' EXIT
: >"$images/build.log"
printf '{"default":[{"type":"insecureAcceptAnything"}]}\n' >"$images/policy.json"

program localhost/csi-quobyte-test/pause:1 pause
program localhost/csi-quobyte-test/snapshot-controller:1 snapshot-controller
for sidecar in provisioner attacher resizer snapshotter; do
  program "$sidecars_prefix/csi-$sidecar:$(tag "$sidecar")" "csi-$sidecar"
done
busybox
reference
