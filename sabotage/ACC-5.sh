#!/bin/sh
# Opening the API opens port 3000 too.
. "$(dirname "$0")/lib.sh"
case $1 in
on) pass output tcp dport 3000 && pass input tcp sport 3000 ;;
off) unpass ;;
esac
