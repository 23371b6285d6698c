#!/usr/bin/env bash
# Builds what checks the Helm chart and prints the directory that holds it, $CSI_QUOBYTE_CACHE/bin:
#   helm             renders and lints the chart
#   kubeconform      compares rendered objects with schemas of their kinds
# and, beside them in $CSI_QUOBYTE_CACHE/kubernetes, what the schemas are made from:
#   swagger.json               Kubernetes' own OpenAPI description
#   volumesnapshotclasses.yaml the CustomResourceDefinition of that kind
# All of it comes as Go modules, which Go checks against its public checksum database; 2 to 3 minutes once. What is
# there already in the wanted version is not made again. One run at a time.
#
# Usage: PATH="$(tests/tools/helm.sh):$PATH"
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export CSI_QUOBYTE_CACHE="${CSI_QUOBYTE_CACHE:-/var/cache/csi-quobyte}"
cache="$CSI_QUOBYTE_CACHE"
readonly helm_version="v4.3.1" kubeconform_version="v0.8.0" kubernetes_version="v1.37.2" snapshotter_version="v8.7.0"
readonly build_timeout_s=900 download_timeout_s=300

die() {
  printf 'helm.sh: %s\n' "$*" >&2
  exit 1
}

# is_stamped FILE VERSION; stamp FILE VERSION: the stamp is written last, so an interrupted step is done again.
is_stamped() { [[ -e "$1" && -e "$1.version" && "$(<"$1.version")" == "$2" ]]; }
stamp() { printf '%s\n' "$2" >"$1.version.tmp" && mv "$1.version.tmp" "$1.version"; }

# program NAME PACKAGE VERSION: without cgo no C compiler is needed.
program() {
  is_stamped "$cache/bin/$1" "$3" && return 0
  mkdir -p "$cache/bin"
  rm -rf "$cache/bin/$1.tmp"
  GOTOOLCHAIN=local CGO_ENABLED=0 GOBIN="$cache/bin/$1.tmp" GOFLAGS=-trimpath timeout "$build_timeout_s" \
    "$go" install -ldflags "-s -w" "$2@$3" >"$cache/$1.log" 2>&1 || {
    cat "$cache/$1.log" >&2
    die "$1 could not be built"
  }
  mv "$cache/bin/$1.tmp/$1" "$cache/bin/$1"
  rm -rf "$cache/bin/$1.tmp" "$cache/$1.log"
  stamp "$cache/bin/$1" "$3"
}

# file_of MODULE VERSION PATH NAME: keeps one file of a module. The module is unpacked in Go's module cache, not here.
file_of() {
  local directory target="$cache/kubernetes/$4"
  is_stamped "$target" "$2" && return 0
  mkdir -p "$cache/kubernetes"
  directory="$(cd "$cache" && GOTOOLCHAIN=local GOFLAGS='' GOWORK=off timeout "$download_timeout_s" \
    "$go" mod download -json "$1@$2" | sed -n 's/^\t"Dir": "\(.*\)",\{0,1\}$/\1/p')" || die "$1@$2 could not be downloaded"
  install -m 0644 -- "$directory/$3" "$target.tmp"
  mv "$target.tmp" "$target"
  stamp "$target" "$2"
}

umask 022
mkdir -p "$cache"
exec {lock}>"$cache/helm.lock"
flock -w 1800 "$lock" || die "another run has not ended"
go="$("$here/go.sh")"

program helm helm.sh/helm/v4/cmd/helm "$helm_version"
program kubeconform github.com/yannh/kubeconform/cmd/kubeconform "$kubeconform_version"
file_of k8s.io/kubernetes "$kubernetes_version" api/openapi-spec/swagger.json swagger.json
file_of github.com/kubernetes-csi/external-snapshotter/client/v8 "$snapshotter_version" \
  config/crd/snapshot.storage.k8s.io_volumesnapshotclasses.yaml volumesnapshotclasses.yaml
printf '%s\n' "$cache/bin"
