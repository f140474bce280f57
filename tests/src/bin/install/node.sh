#!/bin/bash
# What a stranger does on a bare Debian, run in its root file system. The commands are the README's, in
# files beside this one; MODEL_SUM and WEIGHTS_SUM are what the files must hash to.
set -euo pipefail
here=/root/try

say() { printf -- '--- %s\n' "$*"; }
step() {
    say "$(cat "$here/$1")"
    bash -euo pipefail "$here/$1"
}
# All files but those that dpkg, apt and containerd keep for themselves. A directory that had many
# entries stays as large.
files() {
    find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp \
        -o -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/cache -o -path /var/log \
        -o -path /var/lib/containerd -o -path /etc/cni -o -path "$here" \) -prune \
        -o -type d -printf '%p %y\n' -o -printf '%p %y %s\n' | sort
}
wait_for() {
    for _ in $(seq 600); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    say "waited in vain for: $*"
    return 1
}
same() { [ "$1" = "$2" ] || { say "wrong bytes: $1, not $2"; return 1; }; }

files >"$here/before"
step install
weightfs --version

# systemd would do this; there is none in here.
weightfs keeper -- weightfs serve >"$here/daemon.log" 2>&1 &
keeper=$!
wait_for test -S /run/weightfs/control.sock
wait_for weightfs status

mkdir /mnt/model
step mount
same "$(cd /mnt/model && sha256sum model.safetensors | cut -d' ' -f1)" "$MODEL_SUM"
weightfs status

step node
containerd >"$here/containerd.log" 2>&1 &
containerd=$!
wait_for ctr version
step rpull
say "ctr run: the weights in a container"
same "$(ctr run --rm --snapshotter weightfs "$IMAGE" try sha256sum /models/weights |
    cut -d' ' -f1)" "$WEIGHTS_SUM"
weightfs status "$IMAGE" --json | grep -q '"mode": "lazy"'
weightfs doctor || say "doctor: something to mend, as there is no systemd"

say "away again"
ctr image rm --sync "$IMAGE" >/dev/null
weightfs umount /mnt/model
rmdir /mnt/model
kill $containerd && wait $containerd || true
kill $keeper && wait $keeper
dpkg --purge weightfs
files >"$here/after"
diff "$here/before" "$here/after" || { say "left behind"; exit 1; }
! grep -q weightfs /proc/self/mounts || { say "left mounted"; exit 1; }
say "nothing is left"
