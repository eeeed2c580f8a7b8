# What the live sabotages share. They run as root against a running installation:
#   sabotage/<ID>.sh on|off     ROOT its root, FABRIC its network namespace
set -eu
: "${ROOT:?}" "${FABRIC:?}" "${1:?on or off}"
STATE=$ROOT/var/lib/casemate
RUN=$ROOT/run/casemate

fabric() { ip netns exec "$FABRIC" "$@"; }

# pass CHAIN [MATCH…]: lets packets pass before the platform's rules see them.
pass() {
    chain=$1
    shift
    fabric nft insert rule inet casemate "$chain" "$@" accept comment '"sabotage"'
}

# Takes away every rule that `pass` put in.
unpass() {
    for chain in prerouting output input forward; do
        fabric nft -a list chain inet casemate "$chain" | sed -n '/"sabotage"/s/.*# handle //p' |
            while read -r handle; do
                fabric nft delete rule inet casemate "$chain" handle "$handle"
            done
    done
}

# Runs a command in the background until `end`.
begin() {
    setsid "$@" </dev/null >/dev/null 2>&1 &
    echo $! >"$RUN/sabotage.pid"
}

end() {
    kill -- "-$(cat "$RUN/sabotage.pid")"
    rm "$RUN/sabotage.pid"
}
