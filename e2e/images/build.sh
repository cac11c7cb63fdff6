#!/bin/bash
# Builds the images every test cluster starts with, as OCI archives named after
# what they are, and prints the directory that holds them.
#
#   localhost/pause:1                              pause.tar
#   localhost/busybox:1                            busybox.tar
#   gcr.io/distroless/static-debian12:latest       distroless.tar
#   gcr.io/distroless/static-debian12:nonroot      nonroot.tar
#
# Kept in the per-user cache under a hash of everything that goes in.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${NIX_CSI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/nix-csi}
distroless=gcr.io/distroless/static-debian12
certificates=/etc/ssl/certs/ca-certificates.crt
zoneinfo=/usr/share/zoneinfo
busybox=$(type -P busybox) || { echo "images/build.sh: busybox is missing; see e2e/setup.sh" >&2; exit 1; }

input_hash() {
    {
        cat "$here"/Containerfile.* "$here"/pause.c "$here"/*.sh "$certificates" "$busybox"
        # 2,000 small files: their names and the version marker stand for them.
        ls -R "$zoneinfo"
        cat "$zoneinfo/tzdata.zi" "$zoneinfo/UTC" 2>/dev/null || true
    } | sha256sum | cut -c1-16
}

# What gcr.io/distroless/static has: certificates, time zones, users, /tmp.
make_distroless_rootfs() {
    local root=$1
    mkdir -p "$root"/{etc/ssl/certs,usr/share,tmp,root,home,var/tmp,run}
    chmod 1777 "$root/tmp" "$root/var/tmp"
    chmod 700 "$root/root"
    cp -L "$certificates" "$root/etc/ssl/certs/"
    cp -a "$zoneinfo" "$root/usr/share/zoneinfo"
    # Two more copies of everything, which nobody here asks for.
    rm -rf "$root/usr/share/zoneinfo"/{posix,right}
    cat >"$root/etc/passwd" <<'PASSWD'
root:x:0:0:root:/root:/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin
nonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin
PASSWD
    cat >"$root/etc/group" <<'GROUP'
root:x:0:
nobody:x:65534:
tty:x:5:
staff:x:50:
nonroot:x:65532:
GROUP
    echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
    cat >"$root/etc/os-release" <<'RELEASE'
PRETTY_NAME="Distroless (nix-csi stand-in)"
NAME="Debian GNU/Linux"
ID="debian"
RELEASE
}

make_busybox_rootfs() {
    local root=$1 applet
    mkdir -p "$root"/{bin,sbin,usr/bin,usr/sbin,etc,tmp,root,var/www,run}
    chmod 1777 "$root/tmp"
    cp "$busybox" "$root/bin/busybox"
    while read -r applet; do
        [[ -e $root/$applet ]] || ln -s /bin/busybox "$root/$applet"
    done < <("$busybox" --list-full | grep -v '^bin/busybox$')
    echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
    echo 'root:x:0:' >"$root/etc/group"
}

build_all() {
    local work=$1
    mkdir "$work/context" "$work/images"
    gcc -static -Os -Wall -Wextra -s -o "$work/context/pause" "$here/pause.c"
    make_distroless_rootfs "$work/context/rootfs"
    mkdir -p "$work/context/home/nonroot"
    chmod 700 "$work/context/home/nonroot"
    make_busybox_rootfs "$work/context/busybox-rootfs"
    local name file
    while read -r name file; do
        "$here/archive.sh" "$here/Containerfile.$file" "$work/context" "$name" "$work/images/$file.tar"
    done <<EOF_IMAGES
localhost/pause:1 pause
localhost/busybox:1 busybox
$distroless:latest distroless
$distroless:nonroot nonroot
EOF_IMAGES
}

result=$cache/images-$(input_hash)
if [[ ! -d $result ]]; then
    mkdir -p "$cache"
    exec 9>"$cache/images-build.lock"
    flock 9
    if [[ ! -d $result ]]; then
        work=$(mktemp -d "$cache/.images.XXXXXX")
        trap 'rm -rf -- "$work"' EXIT
        build_all "$work" 9>&-
        chmod 755 "$work/images"
        mv -T "$work/images" "$result"
    fi
fi
echo "$result"
