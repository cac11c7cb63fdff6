# shellcheck shell=bash
# What `cluster` and `node.sh` both know: where things are, which process is the
# cluster's first, and how to take its cgroups away.
#
# The state directory holds
#   process      "pid start-time boot-id" of the first process, as the machine sees it
#   kubeconfig   for the administrator, complete in itself
#   kube         link to the directory with the Kubernetes programs in use
#   caches       link to the directory nginx serves
#   ready        there once the node's components all answer
#   failed       one line: why the node gave up
#   node/        everything the node keeps; log/ in it holds a file per component

e2e_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
state=$(realpath -m "${NIX_CSI_CLUSTER_STATE:-$(dirname "$e2e_dir")/target/e2e/cluster}")

# Every cgroup of this cluster is below this one, in each hierarchy. Made from
# the state directory's name, so leftovers of a killed cluster are found again.
cgroup_root() { echo "/nix-csi-e2e-$(printf %s "$state" | sha256sum | cut -c1-8)"; }

# Prints "pid start-time" out of a line of /proc/PID/stat, whose second field may
# itself contain blanks and brackets.
parse_stat() {
    local fields
    read -r -a fields <<<"${1##*) }"
    echo "${1%% *} ${fields[19]}"
}

# The first process's pid, if it is alive and truly ours: a pid alone may have
# been given to somebody else since, or be of before a reboot.
cluster_pid() {
    local pid start boot stat
    [[ -e $state/process ]] || return 1
    read -r pid start boot <"$state/process" || return 1
    [[ $boot == "$(</proc/sys/kernel/random/boot_id)" ]] || return 1
    { read -r stat <"/proc/$pid/stat"; } 2>/dev/null || return 1
    [[ $(parse_stat "$stat") == "$pid $start" ]] || return 1
    # A zombie is as good as gone.
    [[ $stat != *") Z "* ]] || return 1
    echo "$pid"
}

# Removes the cluster's cgroups, deepest first. A cgroup stays busy for a moment
# after its last process died.
remove_cgroups() {
    local name top left
    name=$(cgroup_root)
    for _ in {1..50}; do
        left=
        # One level down in the hierarchies of cgroup v1, at the top in v2.
        for top in /sys/fs/cgroup"$name" /sys/fs/cgroup/*"$name"; do
            [[ -d $top ]] || continue
            find "$top" -depth -type d -exec rmdir {} + 2>/dev/null || true
            [[ ! -d $top ]] || left+=" $top"
        done
        [[ -n $left ]] || return 0
        sleep 0.1
    done
    echo "cluster: these cgroups are still busy:$left" >&2
    return 1
}
