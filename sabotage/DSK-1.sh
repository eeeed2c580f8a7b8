#!/bin/sh
# Another process holds the disk files open.
. "$(dirname "$0")/lib.sh"
case $1 in
on)
    # shellcheck disable=SC2016
    begin sh -c 'cd "$1" && until ls ./*.luks; do sleep 0.05; done; exec tail -f ./*.luks' sh "$STATE/warden/disks"
    ;;
off) end ;;
esac
