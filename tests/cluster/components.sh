#!/usr/bin/env bash
# Builds what a Kubernetes consists of, and the CSI sidecars, from the Go module proxy, into $CSI_QUOBYTE_CACHE/cluster/bin.
#
# The versions are those of the go.mod files in modules/; go.sum pins every byte. external-provisioner has a module of its
# own, because it needs another client-go than the rest. Without cgo no C compiler is needed.
#
# 12 to 15 minutes on two cores the first time (Go's build cache makes a later change cheap), nothing when all is there: a
# stamp beside each program, written last, holds a hash of what it was made from. One run at a time.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cache="${CSI_QUOBYTE_CACHE:-/var/cache/csi-quobyte}"
bin="$cache/cluster/bin"
readonly build_timeout_s=1800

die() {
  printf 'components: %s\n' "$*" >&2
  exit 1
}

# version_of DIRECTORY-IN-MODULES MODULE: the version that go.mod requires.
version_of() { awk -v module="$2" '$1 == module { print $2; exit } $1 == "require" && $2 == module { print $3; exit }' "$here/modules/$1/go.mod"; }

# program NAME DIRECTORY PACKAGE [LDFLAGS] [TAGS]
program() {
  local name="$1" directory="$here/$2" package="$3" ldflags="-s -w ${4:-}" tags="${5:-}" id started
  id="$(find "$directory" -maxdepth 1 -name 'go.*' -o -maxdepth 1 -name '*.go' | sort | xargs cat | sha256sum | cut -c 1-16) $package $ldflags $tags"
  [[ -x "$bin/$name" && -e "$bin/$name.stamp" && "$(<"$bin/$name.stamp")" == "$id" ]] && return 0
  [[ -n "$go" ]] || go="$("$here/../tools/go.sh")"
  started=$SECONDS
  rm -f "$bin/$name.stamp"
  (cd "$directory" && CGO_ENABLED=0 GOTOOLCHAIN=local GOWORK=off GOFLAGS="-mod=readonly -buildvcs=false -trimpath" \
    timeout "$build_timeout_s" "$go" build -o "$bin/$name.tmp" -ldflags "$ldflags" -tags "$tags" "$package") \
    >"$bin/$name.log" 2>&1 || {
    tail -n 20 "$bin/$name.log" >&2
    die "$name could not be built; the whole output is in $bin/$name.log"
  }
  mv "$bin/$name.tmp" "$bin/$name"
  printf '%s\n' "$id" >"$bin/$name.stamp"
  printf 'components: %s built (%d s)\n' "$name" $((SECONDS - started))
}

# The definitions of the snapshot API's kinds are files of a module, not of a program.
snapshot_definitions() {
  local version directory name
  version="$(version_of kubernetes github.com/kubernetes-csi/external-snapshotter/client/v8)"
  [[ -e "$cache/cluster/crd/$version" ]] && return 0
  [[ -n "$go" ]] || go="$("$here/../tools/go.sh")"
  directory="$(cd "$here/modules/kubernetes" && GOTOOLCHAIN=local GOWORK=off timeout 300 \
    "$go" mod download -json "github.com/kubernetes-csi/external-snapshotter/client/v8@$version" | sed -n 's/^\t"Dir": "\(.*\)",\{0,1\}$/\1/p')"
  rm -rf "$cache/cluster/crd"
  mkdir -p "$cache/cluster/crd"
  for name in volumesnapshotclasses volumesnapshotcontents volumesnapshots; do
    install -m 0644 -- "$directory/config/crd/snapshot.storage.k8s.io_$name.yaml" "$cache/cluster/crd/$name.yaml"
  done
  touch "$cache/cluster/crd/$version"
}

umask 022
mkdir -p "$bin"
exec {lock}>"$cache/cluster/components.lock"
flock -w 3600 "$lock" || die "another build has not ended"
go=""

kubernetes="$(version_of kubernetes k8s.io/kubernetes)"
[[ -n "$kubernetes" ]] || die "modules/kubernetes/go.mod names no k8s.io/kubernetes"
minor="${kubernetes#v1.}"
# The components parse their own version, and client-go has a copy of the package.
stamp="-X k8s.io/component-base/version.gitVersion=$kubernetes -X k8s.io/component-base/version.gitMajor=1 \
-X k8s.io/component-base/version.gitMinor=${minor%%.*} -X k8s.io/component-base/version.gitTreeState=clean \
-X k8s.io/component-base/version.buildDate=1970-01-01T00:00:00Z -X k8s.io/client-go/pkg/version.gitVersion=$kubernetes"
for name in kube-apiserver kubelet kube-controller-manager kube-scheduler kube-proxy kubectl; do
  program "$name" modules/kubernetes "k8s.io/kubernetes/cmd/$name" "$stamp"
done
program etcd modules/kubernetes go.etcd.io/etcd/server/v3
containerd="$(version_of kubernetes github.com/containerd/containerd/v2)"
for name in containerd containerd-shim-runc-v2 ctr; do
  program "$name" modules/kubernetes "github.com/containerd/containerd/v2/cmd/$name" \
    "-X github.com/containerd/containerd/v2/version.Version=${containerd#v}" "no_btrfs no_devmapper no_zfs no_aufs"
done
csi=github.com/kubernetes-csi
program csi-attacher modules/kubernetes "$csi/external-attacher/v4/cmd/csi-attacher" "-X main.version=$(version_of kubernetes $csi/external-attacher/v4)"
program csi-resizer modules/kubernetes "$csi/external-resizer/v2/cmd/csi-resizer" "-X main.version=$(version_of kubernetes $csi/external-resizer/v2)"
program csi-snapshotter modules/kubernetes "$csi/external-snapshotter/v8/cmd/csi-snapshotter" "-X main.version=$(version_of kubernetes $csi/external-snapshotter/v8)"
program snapshot-controller modules/kubernetes "$csi/external-snapshotter/v8/cmd/snapshot-controller" "-X main.version=$(version_of kubernetes $csi/external-snapshotter/v8)"
program csi-provisioner modules/provisioner "$csi/external-provisioner/v6/cmd/csi-provisioner" "-X main.version=$(version_of provisioner $csi/external-provisioner/v6)"
program pause modules/pause .
program reference reference . # what cluster-bench compares with
snapshot_definitions
