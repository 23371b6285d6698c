# Sourced by the other scripts of this directory: where things are, and how to get into a node.

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
export CSI_QUOBYTE_CACHE="${CSI_QUOBYTE_CACHE:-/var/cache/csi-quobyte}"
export CLUSTER_RUN="${CLUSTER_RUN:-$CSI_QUOBYTE_CACHE/cluster/run}" # all state of one cluster; gone with `down`
bin="$CSI_QUOBYTE_CACHE/cluster/bin"
images="$CSI_QUOBYTE_CACHE/cluster/images"
logs="$CLUSTER_RUN/log"
pki="$CLUSTER_RUN/pki"
export KUBECONFIG="$CLUSTER_RUN/admin.kubeconfig"

readonly nodes=(node-a node-b)
readonly hub=cq-hub hub_address=10.200.0.1 # the network namespace of the control plane, with the bridge to the nodes
declare -rA node_address=([node-a]=10.200.0.11 [node-b]=10.200.0.12)
declare -rA pod_network=([node-a]=10.201.1.0/24 [node-b]=10.201.2.0/24)
readonly service_network=10.96.0.0/16 pods_network=10.201.0.0/16
readonly pools="$CLUSTER_RUN/quobyte" # the directory on the hosts in which the stand-ins for Quobyte volumes are mounted

die() {
  printf 'cluster: %s\n' "$*" >&2
  exit 1
}

# Not `ip netns exec`: that mounts /sys anew and hides the control groups.
in_hub() { nsenter --net="/run/netns/$hub" -- "$@"; }
in_net() { nsenter --net="/run/netns/cq-$1" -- "${@:2}"; }
in_node() { nsenter --target "$(<"$CLUSTER_RUN/$1/init.pid")" --mount --uts --ipc --net --pid -- "${@:2}"; }
kubectl() { in_hub "$bin/kubectl" "$@"; }

# wait_until SECONDS WHAT COMMAND...
wait_until() {
  local deadline=$((SECONDS + $1)) what="$2"
  shift 2
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || die "$what did not come true in time"
    sleep 0.2
  done
}
