#!/usr/bin/env bash
# nix-version.sh trixie|sid
#
# Prints a directory with an unpacked root file system: that Debian release's Nix and all
# it depends on, and a file `version`, what its `nix --version` says. Downloads once, with
# the machine's Debian mirror and keys. Debian's newer packages alone do not renew it; to
# get them, remove the directory.
#
#   NIX_SH_ROOTFS=$(e2e/nix-version.sh sid) e2e/fixtures/nix.sh nix-store --version
set -euo pipefail
exec 3>&1 1>&2

case ${1-} in
  trixie | sid) suite=$1 ;;
  *)
    echo "usage: nix-version.sh trixie|sid"
    exit 64
    ;;
esac

e2e=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
cache=${NIX_CSI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/nix-csi}
key=$(sha256sum <"$e2e/nix-version.sh" | cut -c1-16)
result=$cache/nix-$suite-$key

if [[ -d $result ]]; then
  echo "$result" >&3
  exit
fi

for c in apt-get dpkg-deb flock; do
  command -v "$c" >/dev/null || {
    echo "nix-version: $c is missing; this needs Debian or Ubuntu"
    exit 1
  }
done

mkdir -p "$cache"
cache=$(cd "$cache" && pwd -P)
result=$cache/nix-$suite-$key
exec 9>"$cache/nix-$suite.lock"
flock 9
if [[ -d $result ]]; then # somebody else was faster
  echo "$result" >&3
  exit
fi

say() { echo "nix-version: $*"; }
shopt -s nullglob
rm -rf --one-file-system "$cache/.nix-$suite-build".* # of builds that were killed
work=$(mktemp -d "$cache/.nix-$suite-build.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
chmod 755 "$work"

# --- an apt of its own ------------------------------------------------------
# The mirror is where the machine gets its own release from.
codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
mirror=$(apt-get indextargets --format "\$(RELEASE) \$(COMPONENT) \$(REPO_URI)" 'Created-By: Packages' |
  awk -v release="$codename" '$1 == release && $2 == "main" { print $3; exit }')
[[ -n $mirror ]] || {
  say "apt has no sources for ${codename:-this release}"
  exit 1
}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
signed=
[[ ! -r $keyring ]] || signed="[signed-by=$keyring]" # otherwise what apt trusts anyway
mkdir -p "$work"/apt/{lists/partial,archives/partial,preferences.d}
: >"$work/apt/status"
echo "deb $signed $mirror $suite main" >"$work/apt/sources.list"
# Read after the machine's configuration: its proxy holds, its hooks and pins do not.
cat >"$work/apt/apt.conf" <<END
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Pre-Install-Pkgs;
#clear DPkg::Post-Invoke;
#clear APT::Default-Release;
Dir::State "$work/apt";
Dir::State::lists "$work/apt/lists";
Dir::State::status "$work/apt/status";
Dir::State::extended_states "$work/apt/extended_states";
Dir::Cache "$work/apt";
Dir::Cache::archives "$work/apt/archives";
Dir::Etc::sourcelist "$work/apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "$work/apt/preferences.d";
Dir::Log "$work/apt";
APT::Architectures { "amd64"; };
APT::Install-Recommends "false";
APT::Keep-Downloaded-Packages "true";
Acquire::Languages "none";
Acquire::PDiffs "false";
END
# The user apt downloads as cannot write here.
[[ $(id -u) -ne 0 ]] || echo 'APT::Sandbox::User "root";' >>"$work/apt/apt.conf"
apt() { apt-get -q -y -c "$work/apt/apt.conf" -o Dpkg::Use-Pty=0 "$@" >>"$work/apt.log" 2>&1; }

say "downloading Nix of Debian $suite"
if ! { apt update && apt install --download-only nix-bin base-files coreutils dash; }; then
  tail -n 20 "$work/apt.log"
  exit 1
fi

# --- unpacked, not installed: no maintainer script runs ---------------------
root=$work/root
mkdir -p "$root"/usr/{bin,lib,lib64,sbin} "$root/etc"
ln -s usr/bin usr/lib usr/lib64 usr/sbin "$root/"
for deb in "$work"/apt/archives/*.deb; do
  dpkg-deb -x "$deb" "$root"
done
# What scripts would have made, as far as Nix wants it.
echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
echo 'root:x:0:' >"$root/etc/group"
printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"

NIX_SH_ROOTFS=$root "$e2e/fixtures/nix.sh" nix --version >"$root/version"
mv -T "$root" "$result"
say "$(<"$result/version") in $result"
echo "$result" >&3
