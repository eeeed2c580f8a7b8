#!/bin/sh
# The gateway address answers workspaces.
. "$(dirname "$0")/lib.sh"
case $1 in
on) pass input tcp dport 80 && pass output tcp sport 80 ;;
off) unpass ;;
esac
