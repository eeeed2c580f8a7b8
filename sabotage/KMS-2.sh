#!/bin/sh
# The key that unseals everything lies beside what it unseals.
. "$(dirname "$0")/lib.sh"
case $1 in
on) head -c 32 /dev/urandom >"$STATE/kms/unseal.key" ;;
off) rm "$STATE/kms/unseal.key" ;;
esac
