#!/bin/bash
# A whole one-node Kubernetes. `cluster up` starts this as the first process of
# fresh mount, network, PID and UTS namespaces; when it dies, the kernel ends
# every process, mount, address and firewall rule with it. Only cgroups outlive
# it, and those `cluster` removes.
#
#   node0  10.90.0.1/24   the node; static files for tests on port 8080
#   cni0   10.91.0.0/24   pods
#          10.96.0.0/16   Services
#
# From the environment:
#   KUBE_BIN  directory with the Kubernetes programs
#   IMAGES    directory with OCI archives to import
set -euo pipefail
: "${KUBE_BIN:?}" "${IMAGES:?}"

# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

node=$state/node
node_name=node-1
node_ip=10.90.0.1
services=10.96.0.0/16
pods=10.91.0.0/24
export PATH=$KUBE_BIN:$PATH:/usr/sbin:/sbin
umask 022

fail() {
    echo "$*" >"$state/failed"
    exit 1
}

# /proc is still the machine's here, so it shows the pid by which the machine
# knows this process; later only the namespace's own pids are to be seen.
record_process() {
    local stat
    read -r stat </proc/self/stat
    echo "$(parse_stat "$stat") $(</proc/sys/kernel/random/boot_id)" >"$state/process.new"
    mv "$state/process.new" "$state/process"
}

# --- mounts -------------------------------------------------------------------

# Covers what the components insist on writing to, so the machine's own files
# neither change nor show through.
prepare_mounts() {
    mkdir -p "$node"/{etcd,pki,conf,log,pids,tmp,nginx,volumeplugins,containerd-opt,sysctl} \
        "$node"/var-lib/{kubelet,containerd,nix-csi} "$node/var-log"
    # Go programs and containerd's helpers would otherwise use /tmp.
    export TMPDIR=$node/tmp
    # As kubectl would use the home directory.
    export KUBECACHEDIR=$node/kubectl-cache

    mount -t tmpfs -o mode=755 run /run
    mount -t proc -o nosuid,nodev,noexec proc /proc
    shield_sysctls

    mkdir -p /run/lock /run/netns /run/containerd
    # Debian links it; elsewhere it may be a directory of its own.
    [[ -L /var/run ]] || mount --bind /run /var/run

    mount -t tmpfs -o mode=755 var-lib /var/lib
    local name
    mkdir -p /var/lib/{cni,nginx}
    for name in kubelet containerd nix-csi; do
        mkdir "/var/lib/$name"
        mount --bind "$node/var-lib/$name" "/var/lib/$name"
    done
    mount --bind "$node/var-log" /var/log

    # As systemd leaves it on a real node. Bidirectional mount propagation needs
    # a shared mount. The machine's mounts are no peers of these.
    mount --make-rshared /
}

# kubelet sets these for the whole machine, whatever its configuration says.
# It sees the values it wants and leaves the true ones alone.
shield_sysctls() {
    local name value
    while read -r name value; do
        [[ -e /proc/sys/$name ]] || continue
        echo "$value" >"$node/sysctl/${name//\//.}"
        mount --bind "$node/sysctl/${name//\//.}" "/proc/sys/$name"
    done <<SYSCTLS
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
SYSCTLS
}

# --- components ---------------------------------------------------------------

# Starts a component and starts it again whenever it ends, as an init system
# would. Until the node is ready, its end is the node's failure instead.
component() {
    local name=$1
    shift
    (
        while :; do
            local status=0
            "$@" >>"$node/log/$name.log" 2>&1 </dev/null &
            echo $! >"$node/pids/$name"
            wait $! || status=$?
            echo "$(date -u +%FT%TZ) $name ended with status $status" >>"$node/log/node.log"
            if [[ ! -e $state/ready ]]; then
                echo "$name ended with status $status" >"$state/failed"
                exit
            fi
            sleep 0.5
        done
    ) &
}

# Waits until a command succeeds, but not for a component that has died.
await() {
    local what=$1 seconds=$2
    shift 2
    local end=$((SECONDS + seconds))
    until "$@" >/dev/null 2>&1; do
        [[ ! -e $state/failed ]] || exit 1
        ((SECONDS < end)) || fail "$what did not answer within $seconds s"
        sleep 0.1
    done
}

listens() { (exec 3<>"/dev/tcp/$1/$2"); }

# --- network, keys, configuration ---------------------------------------------

prepare_network() {
    hostname "$node_name"
    ip link set lo up
    # A bridge without ports, as not every kernel has the dummy device.
    ip link add node0 type bridge
    ip address add "$node_ip/24" dev node0
    ip link set node0 up
    # Goes nowhere, but without it Service addresses have no route at all.
    ip route add default dev node0
    echo 1 >/proc/sys/net/ipv4/ip_forward
}

# sign NAME SUBJECT [EXTENSIONS]
sign() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1.key" 2>/dev/null
    openssl req -new -key "$1.key" -subj "$2" -out "$1.csr"
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 \
        -extfile <(echo "${3:-}") -out "$1.crt" 2>/dev/null
}

make_keys() (
    cd "$node/pki"
    umask 077
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -keyout ca.key -out ca.crt \
        -days 3650 -subj /CN=nix-csi-e2e-ca 2>/dev/null
    sign apiserver /CN=kube-apiserver "subjectAltName=IP:127.0.0.1,IP:$node_ip,IP:10.96.0.1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc"
    sign kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client extendedKeyUsage=clientAuth
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out service-accounts.key 2>/dev/null
    openssl pkey -in service-accounts.key -pubout -out service-accounts.pub
)

# credentials FILE USER [GROUP]: a kubeconfig for one user with a token of its own.
credentials() {
    local token
    token=$(openssl rand -hex 16)
    echo "$token,$2,$2${3:+,\"$3\"}" >>"$node/pki/tokens.csv"
    cat >"$1" <<KUBECONFIG
apiVersion: v1
kind: Config
clusters:
- name: e2e
  cluster:
    server: https://127.0.0.1:6443
    certificate-authority-data: $(base64 -w0 "$node/pki/ca.crt")
users:
- name: $2
  user: {token: $token}
contexts:
- name: e2e
  context: {cluster: e2e, user: $2}
current-context: e2e
KUBECONFIG
    chmod 600 "$1"
}

write_credentials() {
    credentials "$state/kubeconfig" admin system:masters
    credentials "$node/conf/controller-manager.kubeconfig" system:kube-controller-manager
    credentials "$node/conf/scheduler.kubeconfig" system:kube-scheduler
    credentials "$node/conf/proxy.kubeconfig" system:kube-proxy
    # The user name NodeRestriction and the Node authorizer look for.
    credentials "$node/conf/kubelet.kubeconfig" "system:node:$node_name" system:nodes
}

write_containerd_config() {
    local snapshotter=overlayfs
    # overlayfs cannot have another overlayfs as its upper layer.
    [[ $(stat -f -c %T "$node") != overlayfs ]] || snapshotter=native
    cat >"$node/conf/containerd.toml" <<TOML
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "$node/containerd-opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "$snapshotter"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$node/conf/cni"
TOML
    mkdir "$node/conf/cni"
    cat >"$node/conf/cni/10-pods.conflist" <<CNI
{
  "cniVersion": "0.4.0",
  "name": "pods",
  "plugins": [
    {
      "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
      "ipam": {"type": "host-local", "ranges": [[{"subnet": "$pods"}]], "routes": [{"dst": "0.0.0.0/0"}]}
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
CNI
}

make_cgroup_root() {
    local hierarchy name
    name=$(cgroup_root)
    if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then
        mkdir -p "/sys/fs/cgroup$name"
        return
    fi
    for hierarchy in /sys/fs/cgroup/*/; do
        # Links like cpu,cpuacct lead to a hierarchy that is listed, too.
        [[ -L ${hierarchy%/} ]] || mkdir -p "$hierarchy$name"
    done
}

write_kubelet_config() {
    # Pods go below a cgroup of this cluster's own, which kubelet wants to find.
    # It could be told not to arrange pods by QoS class at all, but then containerd
    # puts every container below /k8s.io, with anybody else's. Image collection is
    # off: an imported image cannot be pulled again.
    make_cgroup_root
    cat >"$node/conf/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: $node/pki/ca.crt}
authorization: {mode: Webhook}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
volumePluginDir: $node/volumeplugins
cgroupDriver: cgroupfs
cgroupRoot: $(cgroup_root)
cgroupsPerQOS: true
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
evictionHard: {}
oomScoreAdj: 0
imageGCHighThresholdPercent: 100
localStorageCapacityIsolation: false
resolvConf: ""
clusterDNS: []
YAML
}

write_proxy_config() {
    # The conntrack limits are the machine's: zero leaves them alone.
    cat >"$node/conf/proxy.yaml" <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
hostnameOverride: $node_name
clientConnection: {kubeconfig: $node/conf/proxy.kubeconfig}
clusterCIDR: $pods
oomScoreAdj: 0
conntrack: {maxPerCore: 0, min: 0}
YAML
}

write_nginx_config() {
    cat >"$node/conf/nginx.conf" <<NGINX
user root;
daemon off;
worker_processes 1;
pid $node/nginx/pid;
error_log $node/log/nginx.log;
events {}
http {
    types {
        text/x-nix-cache-info nix-cache-info;
        text/x-nix-narinfo narinfo;
        application/x-nix-nar nar xz zst;
        text/plain txt;
    }
    default_type application/octet-stream;
    log_format requests '\$msec\t\$remote_addr\t\$request_method\t\$request_uri\t\$status\t\$body_bytes_sent\t\$http_range\t\$http_user_agent';
    access_log $node/log/nginx-access.log requests;
    sendfile on;
    server {
        listen $node_ip:8080;
        # A link, so that \`cluster up --caches\` can point it elsewhere later.
        root $state/caches;
        autoindex on;
        location /private/ {
            if (\$http_authorization != "Bearer token-of-the-cluster-tests") { return 404; }
        }
        location /slow/nar/ { limit_rate 100k; }
    }
}
NGINX
}

# --- start --------------------------------------------------------------------

start_containerd() {
    write_containerd_config
    component containerd containerd --config "$node/conf/containerd.toml"
    await containerd 20 ctr version
}

import_images() {
    local archive
    for archive in "$IMAGES"/*.tar; do
        ctr -n k8s.io images import "$archive" >>"$node/log/node.log" 2>&1 || fail "cannot import $archive"
    done
}

start_control_plane() {
    make_keys
    write_credentials
    component etcd etcd --name e2e --data-dir "$node/etcd" --unsafe-no-fsync \
        --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
        --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 \
        --initial-cluster e2e=http://127.0.0.1:2380
    await etcd 20 listens 127.0.0.1 2379
    component apiserver kube-apiserver --etcd-servers=http://127.0.0.1:2379 \
        --advertise-address="$node_ip" --secure-port=6443 --service-cluster-ip-range="$services" \
        --tls-cert-file="$node/pki/apiserver.crt" --tls-private-key-file="$node/pki/apiserver.key" \
        --client-ca-file="$node/pki/ca.crt" --token-auth-file="$node/pki/tokens.csv" \
        --service-account-issuer=https://kubernetes.default.svc \
        --service-account-key-file="$node/pki/service-accounts.pub" \
        --service-account-signing-key-file="$node/pki/service-accounts.key" \
        --kubelet-client-certificate="$node/pki/kubelet-client.crt" \
        --kubelet-client-key="$node/pki/kubelet-client.key" \
        --kubelet-preferred-address-types=InternalIP \
        --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged
    # kubectl per attempt is dear, so first the port, then the true answer.
    await apiserver 60 listens 127.0.0.1 6443
    await apiserver 60 kubectl --kubeconfig "$state/kubeconfig" get --raw /readyz
    component controller-manager kube-controller-manager --leader-elect=false \
        --kubeconfig="$node/conf/controller-manager.kubeconfig" --use-service-account-credentials \
        --root-ca-file="$node/pki/ca.crt" \
        --service-account-private-key-file="$node/pki/service-accounts.key" \
        --cluster-signing-cert-file="$node/pki/ca.crt" --cluster-signing-key-file="$node/pki/ca.key"
    component scheduler kube-scheduler --leader-elect=false --kubeconfig="$node/conf/scheduler.kubeconfig"
}

start_node_agents() {
    write_kubelet_config
    write_proxy_config
    component kubelet kubelet --config="$node/conf/kubelet.yaml" \
        --kubeconfig="$node/conf/kubelet.kubeconfig" --hostname-override="$node_name" --node-ip="$node_ip"
    component proxy kube-proxy --config="$node/conf/proxy.yaml"
}

start_cache_server() {
    write_nginx_config
    component nginx nginx -p "$node/nginx" -c "$node/conf/nginx.conf" -e "$node/log/nginx.log"
    await nginx 10 listens "$node_ip" 8080
}

main() {
    prepare_mounts
    prepare_network
    start_containerd
    import_images &
    local importing=$!
    start_control_plane
    start_node_agents
    start_cache_server
    wait "$importing" || exit 1
    await kubelet 60 kubectl --kubeconfig "$state/kubeconfig" \
        wait --for=condition=Ready --timeout=5s "node/$node_name"
    # Pods are refused before their service account exists.
    await controller-manager 30 kubectl --kubeconfig "$state/kubeconfig" get serviceaccount default
    touch "$state/ready"
    # The first process has nothing left to do but reap what is orphaned.
    while :; do sleep 3600; done
}

record_process
main
