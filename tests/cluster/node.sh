#!/usr/bin/env bash
# node.sh NAME: pid 1 of one node, in mount, pid, uts, ipc and network namespaces of its own (cluster.sh starts it).
#
# What is a machine's own on a real node is private here: /run, the kubelet's and the container runtime's directories, the
# driver's state, logs. So paths that every CSI driver has fixed work on two nodes of one machine. When this process is
# killed, the kernel kills everything in the node: a crash of the node, but with the kernel still running, so loop devices
# and mounts in other namespaces live on.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name="$1"
state="$CLUSTER_RUN/$name"

hostname "$name"
mount --make-rshared / # mounts that a pod makes for the kubelet (Bidirectional) must get out of the pod
mount -t tmpfs -o mode=0755 tmpfs /run
mkdir -p /run/lock /run/netns /run/xtables
for directory in kubelet containerd cni csi-quobyte; do
  mkdir -p "$state/$directory" "/var/lib/$directory"
  mount --bind "$state/$directory" "/var/lib/$directory"
  mount --make-rshared "/var/lib/$directory"
done
# each kubelet deletes the log directories of pods that it does not know
mkdir -p "$state/var-log"
mount --bind "$state/var-log" /var/log

# The kubelet sets these for the whole machine (a panic at the first oops among them): it gets copies of its own.
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
  kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
  copy="$state/sysctl/${setting%%=*}"
  [[ -e "/proc/sys/${setting%%=*}" ]] || continue
  mkdir -p "$(dirname "$copy")"
  printf '%s\n' "${setting##*=}" >"$copy"
  mount --bind "$copy" "/proc/sys/${setting%%=*}"
done

mkdir -p "$state/net.d"
cat >"$state/net.d/10-pods.conflist" <<JSON
{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "ptp", "ipMasq": false, "mtu": 1500,
   "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam", "ranges": [[{"subnet": "${pod_network[$name]}"}]],
            "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}]}
JSON
cat >"$state/containerd.toml" <<TOML
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri",
  "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "localhost/csi-quobyte-test/pause:1"
[plugins."io.containerd.cri.v1.runtime"]
  enable_selinux = false
  restrict_oom_score_adj = true # without CAP_SYS_RESOURCE the value cannot go below our own
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "$state/net.d"
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        BinaryName = "$(command -v runc)"
        SystemdCgroup = false
TOML

# Version 1 of control groups: a root for each node, in every hierarchy, before the kubelet starts. Version 2: one.
if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then
  mkdir -p "/sys/fs/cgroup/cq-$name"
else
  for hierarchy in /sys/fs/cgroup/*/; do
    mkdir -p "${hierarchy}cq-$name" 2>/dev/null || true # a hierarchy that is only a link, or read-only
  done
  if [[ -e "/sys/fs/cgroup/cpuset/cq-$name/cpuset.cpus" ]]; then
    cat /sys/fs/cgroup/cpuset/cpuset.cpus >"/sys/fs/cgroup/cpuset/cq-$name/cpuset.cpus"
    cat /sys/fs/cgroup/cpuset/cpuset.mems >"/sys/fs/cgroup/cpuset/cq-$name/cpuset.mems"
  fi
fi

printf 'nameserver 127.0.0.1\n' >"$state/resolv.conf"
cat >"$state/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $pki/ca.crt}}
authorization: {mode: Webhook}
cgroupDriver: cgroupfs
cgroupRoot: /cq-$name
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
imageServiceEndpoint: unix:///run/containerd/containerd.sock
resolvConf: $state/resolv.conf
volumePluginDir: /var/lib/kubelet/volumeplugins
address: ${node_address[$name]}
syncFrequency: 10s
volumeStatsAggPeriod: 10s
nodeStatusUpdateFrequency: 4s
imageMaximumGCAge: 0s
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 100Mi, nodefs.available: "1%", imagefs.available: "1%"}
YAML
cat >"$state/proxy.yaml" <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: $name
clientConnection: {kubeconfig: $CLUSTER_RUN/kube-proxy.kubeconfig}
clusterCIDR: $pods_network
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
YAML

export PATH="$bin:$PATH" # containerd looks for its shim there

# keep NAME COMMAND...: starts it again when it ends, as a service manager does.
keep() {
  while :; do
    "${@:2}" >>"$logs/$name-$1.log" 2>&1 || true
    printf -- '--- %s ended, starting it again\n' "$1" >>"$logs/$name-$1.log"
    sleep 1
  done
}
keep containerd containerd --config "$state/containerd.toml" &
wait_until 30 "containerd's socket" test -S /run/containerd/containerd.sock
keep kubelet kubelet --config="$state/kubelet.yaml" --kubeconfig="$CLUSTER_RUN/$name.kubeconfig" \
  --hostname-override="$name" --node-ip="${node_address[$name]}" --root-dir=/var/lib/kubelet --cert-dir="$state/pki" --v=2 &
keep kube-proxy kube-proxy --config="$state/proxy.yaml" --v=1 &
while :; do # as pid 1 it reaps what is left to it
  sleep 3600 &
  wait $! || true
done
