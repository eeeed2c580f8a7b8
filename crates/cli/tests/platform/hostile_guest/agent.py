"""Root of a workspace takes the agent's listening socket and answers the edge with rubbish.

    agent.py KIND       KIND: garbage | endless | silence | tls_alert | http

Runs until it is killed, or for 20 s.
"""
import ctypes
import os
import socket
import sys
import threading
import time

kind = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
PORT = f"{9991:04X}"
inodes = set()
for table in ("/proc/1/net/tcp", "/proc/1/net/tcp6"):
    try:
        for line in open(table).read().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(":" + PORT) and fields[3] == "0A":
                inodes.add(fields[9])
    except FileNotFoundError:
        pass
pidfd = libc.syscall(434, 1, 0)
stolen = None
for fd in os.listdir("/proc/1/fd"):
    try:
        link = os.readlink(f"/proc/1/fd/{fd}")
    except OSError:
        continue
    if link.startswith("socket:[") and link[8:-1] in inodes:
        stolen = libc.syscall(438, pidfd, int(fd), 0)
if stolen is None or stolen < 0:
    print("no socket: errno", ctypes.get_errno())
    sys.exit(3)
listener = socket.socket(fileno=stolen)
listener.setblocking(True)
print("ready", flush=True)
end = time.monotonic() + 20


def serve():
    while time.monotonic() < end:
        try:
            peer, _ = listener.accept()
        except OSError:
            time.sleep(0.001)
            continue
        try:
            if kind == "garbage":
                peer.sendall(os.urandom(65536))
            elif kind == "endless":
                while time.monotonic() < end:
                    peer.sendall(b"\x16\x03\x03\x40\x00" + b"\xff" * 16384)
            elif kind == "silence":
                time.sleep(20)
            elif kind == "tls_alert":
                peer.sendall(b"\x15\x03\x03\x00\x02\x02\x28")
            else:
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n" + b"x" * 65536)
        except OSError:
            pass
        peer.close()


threads = [threading.Thread(target=serve, daemon=True) for _ in range(8)]
for t in threads:
    t.start()
for t in threads:
    t.join()
