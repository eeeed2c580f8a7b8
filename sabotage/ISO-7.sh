#!/bin/sh
# The firewall takes whatever source address a workspace names.
. "$(dirname "$0")/lib.sh"
case $1 in
on) pass prerouting udp dport 5300 && pass input udp dport 5300 ;;
off) unpass ;;
esac
