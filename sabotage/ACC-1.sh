#!/bin/sh
# Everybody on the host reaches every workspace.
. "$(dirname "$0")/lib.sh"
case $1 in
on) pass output && pass input ;;
off) unpass ;;
esac
