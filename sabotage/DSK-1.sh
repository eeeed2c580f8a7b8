#!/bin/sh
# Another process holds the disk files open.
. "$(dirname "$0")/lib.sh"
case $1 in
on)
    # shellcheck disable=SC2016
    begin sh -c 'cd "$1" && until ls ./*.disk/volume; do sleep 0.05; done; exec tail -f ./*.disk/volume' sh "$STATE/volumes"
    ;;
off) end ;;
esac
