# Shared by the scripts: what a machine needs, and how it gets it. Source it.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export DEBIAN_FRONTEND=noninteractive

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }

die() { printf 'error: %s\n' "$*" >&2; exit 1; }

need_root() {
    [ "$(id -u)" = 0 ] || die "this needs root (users, namespaces, jails): sudo $0"
    command -v cargo >/dev/null || die "no cargo: install the Rust toolchain (rustup) first"
}

apt_updated=
apt_update() {
    [ -n "$apt_updated" ] || apt-get update -q >/dev/null
    apt_updated=1
}

# Debian packages that are not installed yet.
packages() {
    local missing=()
    for p in "$@"; do
        dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
    done
    [ ${#missing[@]} = 0 ] && return
    say "installing ${missing[*]}"
    apt_update
    apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null
}

# QEMU 10 or later: it takes a template's memory read-only, so that no VMM can change it. On
# Debian 12 it is in backports, reached by the mirror that the machine already uses.
qemu() {
    if command -v qemu-system-x86_64 >/dev/null; then
        local major
        major=$(qemu-system-x86_64 --version | sed -n 's/.*version \([0-9]*\).*/\1/p')
        [ "${major:-0}" -ge 10 ] && return
    fi
    apt_update
    if apt-cache policy qemu-system-x86 | grep -qE 'Candidate: 1:([1-9][0-9])\.'; then
        packages qemu-system-x86
        return
    fi
    say "installing qemu-system-x86 from backports"
    local sources=/etc/apt/sources.list.d codename uri
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    # Either file may be missing: grep says so by its status, which is no answer to the question.
    uri=$(grep -hoE '(https?|mirror)[:+][^ ]*/debian/?( |$)' \
        "$sources"/debian.sources /etc/apt/sources.list 2>/dev/null | head -n 1 | tr -d ' ' || true)
    [ -n "$uri" ] || die "found no Debian mirror in /etc/apt; install qemu-system-x86 >= 10 by hand"
    printf 'Types: deb\nURIs: %s\nSuites: %s-backports\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' \
        "$uri" "$codename" > "$sources/casemate-backports.sources"
    apt-get update -q >/dev/null
    apt-get install -y -q --no-install-recommends -t "$codename-backports" qemu-system-x86 >/dev/null
}

# What running the platform and building its images needs.
runtime_packages() {
    packages build-essential cmake ca-certificates cpio zstd xz-utils kmod e2fsprogs erofs-utils \
        mmdebstrap iproute2 util-linux libnftables1
    qemu
}
