#!/bin/sh
# The edge reaches the agent of a workspace that nobody has opened.
. "$(dirname "$0")/lib.sh"
case $1 in
on) pass output tcp dport 9991 && pass input tcp sport 9991 ;;
off) unpass ;;
esac
