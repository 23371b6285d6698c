#!/usr/bin/env bash
# A real Kubernetes of two nodes on this machine, for trying the driver and for its tests: API server, controller manager,
# scheduler, etcd, and two nodes with a kubelet and a containerd each. Everything is in namespaces without a link to the
# machine's own network, below one directory ($CLUSTER_RUN), and ends with `down`.
#
#   cluster.sh up            starts it, with stand-ins for Quobyte volumes and the images loaded
#   cluster.sh install [HELM ARGUMENT...]    installs the chart as its README says, and makes the pool
#   cluster.sh load FILE     loads one more image on the nodes
#   cluster.sh node-up NAME  starts a node again after a crash
#   cluster.sh node-crash NAME               kills its pid 1, and so everything in it
#   cluster.sh kubectl ... | helm ...        with the cluster's credentials
#   cluster.sh run COMMAND...                a command in the control plane's network, KUBECONFIG set
#   cluster.sh welcome                       says how to work with it
#   cluster.sh down          ends it; nothing is left
#
# The pools, as the chart gets them (values.yaml here): `disks`; `small`, 64 MiB, to be filled; `absent`, not mounted.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

readonly small_pool_mib=64
readonly release=csi-quobyte namespace=csi-quobyte

# --- network -----------------------------------------------------------------------------------------------------------

network() {
  local node other
  ip netns add "$hub"
  in_hub ip link set lo up
  in_hub sysctl -qw net.ipv4.ip_forward=1
  in_hub ip link add br0 type bridge
  in_hub ip address add "$hub_address/24" dev br0
  in_hub ip link set br0 up
  for node in "${nodes[@]}"; do
    ip netns add "cq-$node"
    in_hub ip link add "v-$node" type veth peer name eth0 netns "cq-$node"
    in_hub ip link set "v-$node" master br0 up
    in_net "$node" ip link set lo up
    in_net "$node" ip address add "${node_address[$node]}/24" dev eth0
    in_net "$node" ip link set eth0 up
    in_net "$node" ip route add default via "$hub_address"
    in_net "$node" sysctl -qw net.ipv4.ip_forward=1
    in_hub ip route add "${pod_network[$node]}" via "${node_address[$node]}"
  done
  for node in "${nodes[@]}"; do
    for other in "${nodes[@]}"; do
      [[ "$node" == "$other" ]] || in_net "$node" ip route add "${pod_network[$other]}" via "${node_address[$other]}"
    done
  done
}

# --- certificates --------------------------------------------------------------------------------------------------------

authority() {
  openssl ecparam -name prime256v1 -genkey -noout -out "$pki/$1.key"
  openssl req -x509 -new -key "$pki/$1.key" -subj "/CN=cluster-$1" -days 30 -out "$pki/$1.crt"
}

# certificate NAME SUBJECT [ALTERNATIVE-NAMES] [AUTHORITY]
certificate() {
  local authority="$pki/${4:-ca}"
  openssl ecparam -name prime256v1 -genkey -noout -out "$pki/$1.key"
  openssl req -new -key "$pki/$1.key" -subj "$2" |
    openssl x509 -req -days 30 -CA "$authority.crt" -CAkey "$authority.key" -CAcreateserial -out "$pki/$1.crt" \
      -extfile <(printf 'keyUsage=digitalSignature,keyEncipherment\nextendedKeyUsage=clientAuth,serverAuth\nbasicConstraints=CA:FALSE\n%s\n' \
        "${3:+subjectAltName=$3}")
}

# kubeconfig NAME CERTIFICATE
kubeconfig() {
  cat >"$CLUSTER_RUN/$1.kubeconfig" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://$hub_address:6443", certificate-authority-data: $(base64 -w0 <"$pki/ca.crt")}}]
users: [{name: me, user: {client-certificate-data: $(base64 -w0 <"$pki/$2.crt"), client-key-data: $(base64 -w0 <"$pki/$2.key")}}]
contexts: [{name: test, context: {cluster: test, user: me}}]
current-context: test
YAML
  chmod 0600 "$CLUSTER_RUN/$1.kubeconfig"
}

credentials() {
  local node
  mkdir -m 0700 "$pki"
  {
    authority ca
    authority front-ca
    openssl genrsa -out "$pki/accounts.key" 2048
    openssl rsa -in "$pki/accounts.key" -pubout -out "$pki/accounts.pub"
    certificate apiserver /CN=kube-apiserver "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:localhost,IP:127.0.0.1,IP:10.96.0.1,IP:$hub_address"
    certificate kubelet-client /O=system:masters/CN=apiserver-kubelet-client
    certificate front-proxy /CN=front-proxy-client "" front-ca
    certificate admin /O=system:masters/CN=admin
    certificate controller-manager /CN=system:kube-controller-manager
    certificate scheduler /CN=system:kube-scheduler
    certificate kube-proxy /CN=system:kube-proxy
    for node in "${nodes[@]}"; do
      certificate "$node" "/O=system:nodes/CN=system:node:$node"
    done
  } >"$logs/openssl.log" 2>&1 || die "a certificate could not be made, see $logs/openssl.log"
  for node in admin controller-manager scheduler kube-proxy "${nodes[@]}"; do
    kubeconfig "$node" "$node"
  done
}

# --- control plane and nodes -----------------------------------------------------------------------------------------------

start() {
  local name="$1"
  shift
  nsenter --net="/run/netns/$hub" -- setsid "$@" >"$logs/$name.log" 2>&1 </dev/null 9>&- &
  printf '%s\n' $! >"$CLUSTER_RUN/$name.pid"
}

control_plane() {
  # a test cluster's etcd need not survive a power cut
  start etcd "$bin/etcd" --data-dir "$CLUSTER_RUN/etcd" --listen-client-urls http://127.0.0.1:2379 \
    --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380 \
    --initial-advertise-peer-urls http://127.0.0.1:2380 --initial-cluster default=http://127.0.0.1:2380 --unsafe-no-fsync
  start apiserver "$bin/kube-apiserver" --advertise-address="$hub_address" --bind-address=0.0.0.0 --secure-port=6443 \
    --etcd-servers=http://127.0.0.1:2379 --service-cluster-ip-range="$service_network" --authorization-mode=Node,RBAC \
    --enable-admission-plugins=NodeRestriction --allow-privileged=true --enable-aggregator-routing=true \
    --client-ca-file="$pki/ca.crt" --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" \
    --kubelet-client-certificate="$pki/kubelet-client.crt" --kubelet-client-key="$pki/kubelet-client.key" \
    --kubelet-preferred-address-types=InternalIP --service-account-key-file="$pki/accounts.pub" \
    --service-account-signing-key-file="$pki/accounts.key" \
    --service-account-issuer=https://kubernetes.default.svc.cluster.local \
    --requestheader-client-ca-file="$pki/front-ca.crt" --requestheader-allowed-names=front-proxy-client \
    --requestheader-extra-headers-prefix=X-Remote-Extra- --requestheader-group-headers=X-Remote-Group \
    --requestheader-username-headers=X-Remote-User --proxy-client-cert-file="$pki/front-proxy.crt" \
    --proxy-client-key-file="$pki/front-proxy.key"
  wait_until 60 "the API server" kubectl get --raw /readyz
  start controller-manager "$bin/kube-controller-manager" --kubeconfig="$CLUSTER_RUN/controller-manager.kubeconfig" \
    --authentication-kubeconfig="$CLUSTER_RUN/controller-manager.kubeconfig" \
    --authorization-kubeconfig="$CLUSTER_RUN/controller-manager.kubeconfig" --leader-elect=false \
    --use-service-account-credentials=true --root-ca-file="$pki/ca.crt" \
    --service-account-private-key-file="$pki/accounts.key" --requestheader-client-ca-file="$pki/front-ca.crt" \
    --node-monitor-period=2s --node-monitor-grace-period=20s --flex-volume-plugin-dir="$CLUSTER_RUN/flex" \
    --bind-address=127.0.0.1
  start scheduler "$bin/kube-scheduler" --kubeconfig="$CLUSTER_RUN/scheduler.kubeconfig" \
    --authentication-kubeconfig="$CLUSTER_RUN/scheduler.kubeconfig" \
    --authorization-kubeconfig="$CLUSTER_RUN/scheduler.kubeconfig" --leader-elect=false --bind-address=127.0.0.1
}

has_child() { pgrep -P "$1"; }
is_ready() { [[ "$(kubectl get node "$1" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" == True ]]; }

node_start() {
  local node="$1" outer
  mkdir -p "$CLUSTER_RUN/$node"
  # --kill-child: the node ends with its outer process
  nsenter --net="/run/netns/cq-$node" -- setsid unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc \
    "$here/node.sh" "$node" >"$logs/$node.log" 2>&1 </dev/null 9>&- &
  outer=$!
  wait_until 10 "the first process of $node" has_child "$outer"
  printf '%s\n' "$outer" >"$CLUSTER_RUN/$node/outer.pid"
  pgrep -P "$outer" | head -n 1 >"$CLUSTER_RUN/$node/init.pid"
}

node_up() {
  node_start "$1"
  wait_until 90 "$1 Ready" is_ready "$1"
  load_images "$1"
}

# Signals the recorded process, if it still is the one that was started here.
end() {
  local pid
  pid="$(cat "$2" 2>/dev/null)" || return 0
  grep -qF -- "$3" "/proc/$pid/cmdline" 2>/dev/null && kill "-$1" "$pid" 2>/dev/null || true
}

ended() { ! grep -qF -- "$2" "/proc/$1/cmdline" 2>/dev/null; }

node_crash() {
  local pid
  pid="$(<"$CLUSTER_RUN/$1/init.pid")"
  end KILL "$CLUSTER_RUN/$1/init.pid" node.sh
  wait_until 20 "the end of $1" ended "$pid" node.sh
}

# load_image NODE FILE
load_image() {
  in_node "$1" "$bin/ctr" --address /run/containerd/containerd.sock --namespace k8s.io images import --local "$2" \
    >>"$logs/images.log" 2>&1 || die "$2 cannot be loaded on $1, see $logs/images.log"
}

load_images() {
  local file
  for file in "$images"/*.tar "$CSI_QUOBYTE_CACHE/images/csi-quobyte.tar"; do
    load_image "$1" "$file"
  done
}

# --- stand-ins for Quobyte volumes -----------------------------------------------------------------------------------------

stand_ins() {
  local small="$CLUSTER_RUN/small"
  mkdir -p "$pools/absent" "$small.mnt"
  truncate -s "${small_pool_mib}M" "$small.img"
  mkfs.ext4 -q -m 0 "$small.img"
  mount -o loop "$small.img" "$small.mnt"
  mkdir -p "$CLUSTER_RUN/volumes/disks" "$small.mnt/volume"
  # the controller runs as this user, and is no root that may write anywhere
  chown 65532:65532 "$CLUSTER_RUN/volumes/disks" "$small.mnt/volume"
  "$root/tests/tools/standin.sh" up "$CLUSTER_RUN/volumes/disks" "$pools/disks" 9>&-
  "$root/tests/tools/standin.sh" up "$small.mnt/volume" "$pools/small" 9>&-
}

is_mounted() { awk -v path="$1" '$5 == path { found = 1 } END { exit !found }' /proc/self/mountinfo; }

stand_ins_down() {
  local name
  for name in disks small; do
    [[ ! -d "$pools/$name" ]] || "$root/tests/tools/standin.sh" down "$pools/$name"
  done
  ! is_mounted "$CLUSTER_RUN/small.mnt" || umount "$CLUSTER_RUN/small.mnt"
}

# --- the parts -------------------------------------------------------------------------------------------------------------

up() {
  local node
  [[ ! -e "/run/netns/$hub" ]] || die "a cluster is up on this machine, or was not ended: cluster.sh down"
  [[ -x "$bin/kubelet" && -e "$images/busybox.tar" && -e "$CSI_QUOBYTE_CACHE/images/csi-quobyte.tar" ]] ||
    die "its parts are not built yet: make cluster-parts"
  rm -rf --one-file-system -- "$CLUSTER_RUN"
  mkdir -p "$CLUSTER_RUN" "$logs"
  "$here/loops.py" remember "$CLUSTER_RUN"
  network
  credentials
  stand_ins
  control_plane
  for node in "${nodes[@]}"; do
    node_start "$node"
  done
  for node in "${nodes[@]}"; do
    wait_until 90 "$node Ready" is_ready "$node"
    load_images "$node"
  done
  kubectl apply -f "$CSI_QUOBYTE_CACHE/cluster/crd" -f "$here/snapshot-controller.yaml" >/dev/null
  kubectl wait --for=condition=Established crd --all --timeout=30s >/dev/null
  wait_until 60 "the default service account" kubectl get serviceaccount default
  kubectl -n snapshot-controller rollout status deployment/snapshot-controller --timeout=90s >/dev/null
}

helm() {
  HELM_CACHE_HOME="$CLUSTER_RUN/helm" HELM_CONFIG_HOME="$CLUSTER_RUN/helm" HELM_DATA_HOME="$CLUSTER_RUN/helm" \
    in_hub "$CSI_QUOBYTE_CACHE/bin/helm" "$@"
}

# As the chart's README and notes say, with nothing that a user would not do.
install() {
  local pool
  helm upgrade --install "$release" "$root/charts/csi-quobyte" --namespace "$namespace" --create-namespace \
    --values "$here/values.yaml" --set-string "pools[0].hostPath=$pools,pools[1].hostPath=$pools,pools[2].hostPath=$pools" \
    "$@" >"$logs/helm.log" 2>&1 || {
    cat "$logs/helm.log" >&2
    die "helm could not install the chart"
  }
  kubectl label namespace "$namespace" --overwrite pod-security.kubernetes.io/enforce=privileged >/dev/null
  for pool in disks small; do
    wait_until 90 "pool $pool" kubectl -n "$namespace" exec "daemonset/$release-node" -- \
      csi-quobyte pool init "/pools/$pool/$pool" --owner 65532:65532
  done
  # `rollout status` knows no DaemonSet with OnDelete
  kubectl -n "$namespace" wait "daemonset/$release-node" --for=jsonpath='{.status.numberReady}'="${#nodes[@]}" --timeout=120s >/dev/null
  kubectl -n "$namespace" rollout status "deployment/$release-controller" --timeout=120s >/dev/null
}

down() {
  local node name pid groups status=0
  for node in "${nodes[@]}"; do
    end KILL "$CLUSTER_RUN/$node/init.pid" node.sh
    end KILL "$CLUSTER_RUN/$node/outer.pid" node.sh
  done
  for name in scheduler controller-manager apiserver etcd; do
    end TERM "$CLUSTER_RUN/$name.pid" "$bin"
  done
  for name in scheduler controller-manager apiserver etcd; do
    pid="$(cat "$CLUSTER_RUN/$name.pid" 2>/dev/null)" || continue
    for _ in {1..50}; do
      ended "$pid" "$bin" && break
      sleep 0.1
    done
    end KILL "$CLUSTER_RUN/$name.pid" "$bin"
  done
  # While the stand-ins are mounted, a device on a file in them can be told by its file.
  [[ ! -d "$CLUSTER_RUN" ]] || "$here/loops.py" release "$CLUSTER_RUN" "$pools"/* || status=1
  stand_ins_down
  for node in "${nodes[@]}"; do
    [[ ! -e "/run/netns/cq-$node" ]] || ip netns delete "cq-$node"
    for _ in {1..25}; do # a control group is empty a moment after its last process has ended
      mapfile -t groups < <(control_groups "$node")
      ((${#groups[@]})) || break
      find "${groups[@]}" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.2
    done
  done
  [[ ! -e "/run/netns/$hub" ]] || ip netns delete "$hub"
  rm -rf --one-file-system -- "$CLUSTER_RUN"
  left_behind
  return "$status"
}

# control_groups NODE: one in every hierarchy of version 1, one in version 2.
control_groups() { find /sys/fs/cgroup -maxdepth 2 -type d -name "cq-$1"; }

# Says what a cluster has left on the machine, and fails if there is something.
left_behind() {
  local left
  left="$({
    ip netns list | grep -o '^cq-[a-z-]*' | sed 's/^/network namespace /'
    control_groups 'node-*' | sed 's/^/control group /'
    awk -v run="$CLUSTER_RUN/" 'index($5, run) == 1 { print "mount", $5 }' /proc/self/mountinfo
  })" || true
  [[ -z "$left" ]] || die "left behind: ${left//$'\n'/, }"
}

welcome() {
  cat <<TEXT
The cluster is up and the driver is installed in it. To work with it:
  alias kubectl='$here/cluster.sh kubectl'
  kubectl get nodes,storageclasses,volumesnapshotclasses
  kubectl -n $namespace get pods
  kubectl apply -f $root/deploy/examples/disk.yaml      # a claim, and a pod that writes to it
snapshot.yaml and restore.yaml beside it go on from there. There is no registry: pods can use the image busybox:stable.
Of the three pools one is not mounted, for trying that: csi-quobyte check, tree and doctor say so; for one pool give them
--pool disks=/pools/disks/disks. End it with: make cluster-down
TEXT
}

[[ "$(id -u)" == 0 ]] || die "must run as root"
umask 022
case "${1:-}" in
  up | down | node-up | node-crash)
    # 9 is closed for whatever stays running: it would hold the lock
    exec 9>"$CSI_QUOBYTE_CACHE/cluster/cluster.lock"
    flock -w 600 9 || die "another start or end of a cluster has not finished"
    ;;
esac
case "${1:-}" in
  up) up ;;
  down) down ;;
  install) install "${@:2}" ;;
  load) for node in "${nodes[@]}"; do load_image "$node" "$2"; done ;;
  node-up) node_up "$2" ;;
  node-crash) node_crash "$2" ;;
  kubectl) kubectl "${@:2}" ;;
  helm) helm "${@:2}" ;;
  run) in_hub "${@:2}" ;;
  welcome) welcome ;;
  *) sed -n '2,/^set -euo/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed '$d'; exit 2 ;;
esac
