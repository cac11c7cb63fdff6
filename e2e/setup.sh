#!/bin/bash
# Checks that every tool the end-to-end tests need is here, and on Debian and
# Ubuntu, as root, installs what is missing.
#
#   setup.sh [kube|cluster|images|nix|bench|build]...     default: all groups
#
# Silent and quick when nothing is missing. Elsewhere it fails with one message
# that names each missing tool and the Debian package that has it.
set -euo pipefail

# Each line: group, tool (a command, or an absolute path), Debian package. A dash:
# Debian's is too old for this project, so it is never installed, only asked for.
tools='
kube    go                          -
cluster etcd                        etcd-server
cluster containerd                  containerd
cluster containerd-shim-runc-v2     containerd
cluster ctr                         containerd
cluster runc                        runc
cluster /usr/lib/cni/bridge         containernetworking-plugins
cluster /usr/lib/cni/host-local     containernetworking-plugins
cluster /usr/lib/cni/portmap        containernetworking-plugins
cluster /usr/lib/cni/loopback       containernetworking-plugins
cluster iptables                    iptables
cluster ip                          iproute2
cluster conntrack                   conntrack
cluster unshare                     util-linux
cluster nsenter                     util-linux
cluster setsid                      util-linux
cluster flock                       util-linux
cluster openssl                     openssl
cluster nginx                       nginx-light
cluster jq                          jq
images  buildah                     buildah
images  gcc                         gcc
images  busybox                     busybox-static
images  /etc/ssl/certs/ca-certificates.crt ca-certificates
images  /usr/share/zoneinfo/UTC     tzdata
nix     nix-store                   nix-bin
nix     nix                         nix-bin
nix     patchelf                    patchelf
nix     busybox                     busybox-static
nix     bzip2                       bzip2
nix     zstd                        zstd
nix     xz                          xz-utils
nix     sqlite3                     sqlite3
bench   nginx                       nginx-light
bench   jq                          jq
bench   flock                       util-linux
bench   setpriv                     util-linux
bench   unshare                     util-linux
bench   mount                       mount
bench   mkfs.ext4                   e2fsprogs
bench   rsync                       rsync
bench   tar                         tar
bench   fincore                     util-linux
build   cargo                       -
build   gcc                         gcc
build   g++                         g++
'

# Debian keeps some of these out of an ordinary user's PATH.
PATH=$PATH:/usr/sbin:/sbin

present() {
    case $1 in
        /*) [[ -e $1 ]] ;;
        *) type -P "$1" >/dev/null ;;
    esac
}

# Prints "tool package" for each missing tool of the wanted groups.
missing_tools() {
    local group tool package
    while read -r group tool package; do
        [[ -n $group ]] || continue
        [[ " $* " == *" $group "* ]] || continue
        present "$tool" || echo "$tool $package"
    done <<<"$tools"
}

can_install() { [[ $EUID == 0 && -e /etc/debian_version ]] && type -P apt-get >/dev/null; }

# Installs packages without letting any of them start a service: the cluster
# runs its own etcd, containerd and nginx, away from the machine's.
install_packages() {
    local policy=/usr/sbin/policy-rc.d ours=
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        ours=yes
    fi
    local status=0
    {
        apt-get -o DPkg::Lock::Timeout=600 update -qq &&
            DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 \
                install -y -qq --no-install-recommends "$@"
    } >&2 || status=$?
    [[ -z $ours ]] || rm -f "$policy"
    return "$status"
}

main() {
    local groups=("$@")
    [[ $# -gt 0 ]] || groups=(kube cluster images nix bench build)
    local group
    for group in "${groups[@]}"; do
        if [[ ! $group =~ ^(kube|cluster|images|nix|bench|build)$ ]]; then
            echo "setup.sh: no tool group \"$group\"; there are: kube cluster images nix bench build" >&2
            exit 2
        fi
    done

    local missing
    missing=$(missing_tools "${groups[@]}")
    [[ -n $missing ]] || return 0

    if can_install; then
        local packages
        mapfile -t packages < <(awk '$2 != "-" { print $2 }' <<<"$missing" | sort -u)
        if [[ ${#packages[@]} -gt 0 ]]; then
            echo "setup.sh: installing ${packages[*]}" >&2
            # Judged by what is missing afterwards, not by apt's exit code.
            install_packages "${packages[@]}" || echo "setup.sh: apt-get failed" >&2
            missing=$(missing_tools "${groups[@]}")
            [[ -n $missing ]] || return 0
        fi
    fi
    {
        echo "setup.sh: these tools are missing (Debian package in brackets):"
        awk '!seen[$1]++ { print "  " $1 ($2 == "-" ? "" : " (" $2 ")") }' <<<"$missing"
        [[ $missing != *" -"* ]] || echo "  from https://go.dev/dl and https://rustup.rs, as Debian's are too old"
    } >&2
    exit 1
}

main "$@"
