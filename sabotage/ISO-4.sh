#!/bin/sh
# Workspaces are routed to each other.
. "$(dirname "$0")/lib.sh"
route() { fabric sysctl -q -w net.ipv4.ip_forward="$1" net.ipv4.conf.all.proxy_arp="$1"; }
case $1 in
on) route 1 && pass forward ;;
off) route 0 && unpass ;;
esac
