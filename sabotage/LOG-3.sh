#!/bin/sh
# The logs' directories are open to every process of the platform.
. "$(dirname "$0")/lib.sh"
case $1 in
on) chmod o+rx "$STATE/audit-append" "$STATE/audit-integrate" ;;
off) chmod o-rx "$STATE/audit-append" "$STATE/audit-integrate" ;;
esac
