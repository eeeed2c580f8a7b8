"""A workspace's root that puts itself in the agent's place, and answers what it likes.

    agent.py identity     prints the identity block at the front of its own disk
    agent.py names        prints the rows: of /arm, /row, /channel and /reply, a line each
    agent.py replace DIR  stops the agent, for good, and takes its port, its channel and the keys in DIR

Then a path asks for a row: /row/NAME is answered so, /arm/NAME has the next connection met so,
/api/NAME the calls of the runtime API; /channel/NAME says so on the agent's channel, /reply/NAME has
what is asked there answered so. Anything else is answered as it should be.
Runs inside the attacker's workspace, as root, with nothing but Python's own modules.
"""
import ctypes
import json
import mmap
import os
import socket
import ssl
import stat
import sys
import threading
import time
import urllib.parse
import zlib

PORT = 9991
# Of no proper answer: whoever reads it was given what was not meant for him.
UNASKED = b"unasked-for"
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
PLAIN = b'{"success":true,"by":"the replaced agent"}'
BLANKS = b"\r\n"


def whole(body, head=b""):
    return OK + head + b"content-length: %d\r\n\r\n" % len(body) + body


SECOND = whole(UNASKED)

# Said at once, then the connection ends.
SAID = {
    "garbage before the head": b"\0\xffSSH-2.0-x\r\n" + SECOND,
    "no status line": b"content-type: text/plain\r\n\r\n" + UNASKED,
    "a status that is none": b"HTTP/1.1 2x0 OK\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 OK\r\n\r\n",
    "HTTP/2.0 in the status line": b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "half a head": OK + b"content-type: text/pl",
    "a head of 101 lines": OK + b"x: y\r\n" * 101 + BLANKS + UNASKED,
    "a head of 40 KiB": OK + b"x: " + b"y" * 40960 + BLANKS * 2 + UNASKED,
    "two lengths": OK + b"content-length: 5\r\ncontent-length: 3\r\n\r\nshort",
    "a list of lengths": OK + b"content-length: 5, 3\r\n\r\nshort",
    "a negative length": OK + b"content-length: -1\r\n\r\nshort",
    "a length above 64 bits": OK + b"content-length: 99999999999999999999999\r\n\r\nshort",
    "a blank before the colon": OK + b"content-length : 5\r\n\r\nshort",
    "a CR in a value": OK + b"x: y\rset-cookie: a=b\r\ncontent-length: 5\r\n\r\nshort",
    "a NUL in a value": OK + b"x: y\0z\r\ncontent-length: 5\r\n\r\nshort",
    "a folded line": OK + b"x: y\r\n set-cookie: a=b\r\ncontent-length: 5\r\n\r\nshort",
    "a line without a colon": OK + b"set-cookie\r\ncontent-length: 5\r\n\r\nshort",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n" + UNASKED,
    "a body that is too short": OK + b"content-length: 1000\r\n\r\nshort",
    "a chunk of no size": CHUNKED + b"5\r\nshort\r\nzz\r\n" + UNASKED,
    "a chunk above 64 bits": CHUNKED + b"5\r\nshort\r\nffffffffffffffff1\r\n" + UNASKED,
    "a chunk that is too long": CHUNKED + b"5\r\nshort" + UNASKED + b"\r\n0\r\n\r\n",
    "chunks without an end": CHUNKED + b"5\r\nshort\r\n",
}

# The same, and the connection goes on: the next caller's answer must not be what is left on it.
GOES_ON = {
    "length and chunks": OK + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n5\r\nshort\r\n0\r\n\r\n" + SECOND,
    "chunks and length": OK + b"transfer-encoding: chunked\r\ncontent-length: 300\r\n\r\n5\r\nshort\r\n0\r\n\r\n" + SECOND,
    "chunks twice": OK + b"transfer-encoding: chunked\r\n" * 2 + b"\r\n5\r\nshort\r\n0\r\n\r\n" + SECOND,
    "informational answers first": b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 3 + whole(b"short"),
    "the platform's headers": whole(b"short", b"".join(name + b": hostile\r\n" for name in (
        b"strict-transport-security", b"set-cookie", b"access-control-allow-origin",
        b"access-control-allow-credentials", b"cross-origin-resource-policy", b"clear-site-data", b"nel", b"report-to",
        b"www-authenticate", b"alt-svc", b"server", b"via", b"cache-control", b"x-request-id", b"casemate-assertion",
        b"keep-alive", b"upgrade", b"trailer", b"x-hop")) + b"connection: x-hop\r\n"),
    "a gzip bomb": None,
    "JSON nested without end": whole(b"[" * 100_000),
    "an error for a terminal": b"HTTP/1.1 500 No\r\ncontent-length: 64\r\n\r\n"
                               b'{"success":false,"code":"x","message":"\\u001b[2J\\u0007\\r a lie"}',
    "a body that is too long": OK + b"content-length: 5\r\n\r\nshort" + UNASKED + SECOND,
    "a second answer at once": whole(b"short") + SECOND,
    "no content, with content": b"HTTP/1.1 204 No Content\r\n\r\n" + UNASKED + SECOND,
    "an early end of chunks": CHUNKED + b"5\r\nshort\r\n0\r\n\r\n" + SECOND,
}

# The first once, the second until somebody hangs up.
ENDLESS = {
    "a head without end": (OK, b"x: " + b"y" * 1000 + b"\r\n"),
    "a line without end": (OK + b"x: ", b"y" * 4096),
    "a status line without end": (b"HTTP/1.1 200 ", b"y" * 4096),
    "blank lines without end": (b"", BLANKS * 2048),
    "informational answers without end": (b"", b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 100),
    "a chunk's extension without end": (CHUNKED + b"5\r\nshort\r\n1;", b"x" * 4096),
    "trailers without end": (CHUNKED + b"5\r\nshort\r\n0\r\n", b"x: y\r\n" * 500),
    "a body without end": (CHUNKED, b"1000\r\n" + b"x" * 4096 + b"\r\n"),
    "a body of 2^64 bytes": (OK + b"content-length: 18446744073709551613\r\n\r\n", b"x" * 4096),
    "a chunk of 2^64 bytes": (CHUNKED + b"fffffffffffffff0\r\n", b"x" * 4096),
}

# A byte at a time.
DRIPS = {
    "a head, slowly": (b"", OK + b"x: " + b"y" * 100 + b"\r\n\r\n"),
    "informational answers, slowly": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100),
    "a body, slowly": (OK + b"content-length: 100\r\n\r\n", b"x" * 100),
}


def send(tls, said):
    tls.sendall(said)


def go_on(tls, said):
    tls.sendall(said)
    return True


def endless(tls, said):
    tls.sendall(said[0])
    while True:
        tls.sendall(said[1])


def drip(tls, said):
    tls.sendall(said[0])
    for n in range(len(said[1])):
        time.sleep(0.3)
        tls.sendall(said[1][n:n + 1])


def later(tls, _):
    """When its caller is gone, and before there is another."""
    tls.sendall(whole(b"short"))
    time.sleep(0.2)
    return go_on(tls, SECOND)


def reset(tls, said):
    tls.sendall(said)
    # What was sent has its time to arrive; then no farewell, and no end either.
    time.sleep(0.2)
    tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raise ConnectionResetError


ROWS = {name: (how, said) for how, table in (
    (send, SAID), (go_on, GOES_ON), (endless, ENDLESS), (drip, DRIPS),
    (later, {"a second answer later": None}),
    (reset, {"a reset in the head": OK, "a reset in the body": CHUNKED + b"5\r\nshort\r\n"}),
) for name, said in table.items()}


# How a connection is met.
def no_tls(raw, _):
    raw.sendall(SECOND)


def no_records(raw, _):
    raw.sendall(os.urandom(4096))


def silence(raw, _):
    while raw.recv(4096):
        pass


def hang_up(raw, _):
    pass


def change_cipher_specs(raw, _):
    while True:
        raw.sendall(b"\x14\3\3\0\1\1" * 100)


def long_record(raw, _):
    raw.sendall(b"\x16\3\3\xff\xff" + bytes(65535))
    silence(raw, _)


def another(raw, keys):
    context(keys, "other").wrap_socket(raw, server_side=True).recv(4096)


def old_tls(raw, keys):
    old = context(keys, "own")
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.wrap_socket(raw, server_side=True).recv(4096)


def after_handshake(act):
    def row(raw, keys):
        below = raw.dup()
        tls = context(keys, "own").wrap_socket(raw, server_side=True)
        request(tls)
        act(tls, below)
        silence(below, keys)
    return row


ARMS = {
    "no TLS": no_tls,
    "no records": no_records,
    "silence": silence,
    "a hang-up": hang_up,
    "change_cipher_spec without end": change_cipher_specs,
    "a record of 64 KiB": long_record,
    "another's certificate": another,
    "TLS 1.2": old_tls,
    "plain text after the handshake": after_handshake(lambda tls, below: below.sendall(SECOND)),
    "a hello request after the handshake": after_handshake(lambda tls, below: below.sendall(b"\x16\3\3\0\4\0\0\0\0")),
    "half-closed without a farewell": after_handshake(lambda tls, below: below.shutdown(socket.SHUT_WR)),
    "a farewell in the head": after_handshake(lambda tls, below: (tls.sendall(OK), tls.unwrap())),
}


def line(kind, **rest):
    return json.dumps({"type": kind, **rest}).encode() + b"\n"


def piece(number):
    return line("archive_data", number=number, data="QUFB" * 100)


# On the channel to vmctl.
CHANNEL = {
    "messages out of turn": b"".join((
        line("booted", version="\x1b[2J" * 1000), line("rehearsed"), line("down"),
        line("up", kernel="\x1b[2J" * 1000, steps=[{"name": "x", "us": 1}] * 1000),
        line("failed", code="\x1b[2J", message="x" * 30_000))),
    "what is no message": b"\0\xff\xfe\n\n{}\nnull\n\"x\"\n" + b'{"type":"down","type":"down"}\n' + line("attach", ip="x"),
    "nesting without end": (b"[" * 60_000 + b"\n" + b'{"type":' * 7_000 + b"\n") * 3,
    "numbers that are none": b"".join(b'{"type":"archive_done","number":%s,"entries":0,"skipped":0}\n' % n for n in (
        b"-1", b"1e999", b"18446744073709551616", b"0.5", b'"1"', b"1" * 10_000)),
    "archives of nobody": b"".join(piece(n) + line("archive_next", number=n)
                                   + line("archive_done", number=n, entries=1 << 60, skipped=0) for n in range(9)),
    "a line of 4 MiB": b"x" * (4 << 20) + b"\n",
    "a flood": line("up", kernel="x" * 1000) * 20_000,
}

def failed(number):
    return line("archive_failed", number=number, message="\x1b[2J" + "x" * 1000)


# To what vmctl says: the message, and what is said to its number.
REPLIES = {
    "pieces of another archive": ("archive", lambda n: piece(n - 1) + piece(n + 1) + piece(1 << 63) + failed(n)),
    "a piece that is none": ("archive", lambda n: line("archive_data", number=n, data="no base64")),
    "a piece that is too large": ("archive", lambda n: line("archive_data", number=n, data="QUFB" * 15_500)),
    "a failure for a terminal": ("archive", failed),
    "nesting before a failure": ("archive", lambda n: b"[" * 60_000 + b"\n" + failed(n)),
    "numbers beyond all": ("archive", lambda n: piece(n) + line(
        "archive_done", number=n, entries=(1 << 64) - 1, skipped=(1 << 64) - 1)),
    "up, for a terminal": ("wake", lambda _: b"[" * 60_000 + b"\n" + line("up", kernel="\x1b[2Jx" * 1000, steps=[])),
    "it could not": ("wake", lambda _: line("failed", code="\x1b[2J", message="\x1b[2J" + "x" * 1000)),
}


def syscall(number, *args):
    got = ctypes.CDLL(None, use_errno=True).syscall(number, *args)
    if got < 0:
        raise OSError(ctypes.get_errno(), "system call %d" % number)
    return got


def stop_agent():
    """For as long as the calling thread is there."""
    seen = set()
    while new := set(map(int, os.listdir("/proc/1/task"))) - seen:
        for thread in new:
            try:
                for request in (0x4206, 0x4207):  # PTRACE_SEIZE, PTRACE_INTERRUPT
                    syscall(101, request, thread, 0, 0)
                os.waitpid(thread, 0x40000000)  # __WALL
            except (ProcessLookupError, ChildProcessError):
                # It has ended meanwhile.
                pass
        seen |= new


def of_agent(wanted):
    """Copies of the agent's descriptors that are so."""
    agent = syscall(434, 1, 0)  # pidfd_open
    for fd in map(int, os.listdir("/proc/1/fd")):
        try:
            if wanted(os.readlink(f"/proc/1/fd/{fd}")):
                yield syscall(438, agent, fd, 0)  # pidfd_getfd
        except OSError:
            pass


def take_port():
    listener = None
    for fd in of_agent(lambda link: link.startswith("socket:")):
        held = socket.socket(fileno=fd)
        if held.family != socket.AF_INET or held.getsockname()[1] != PORT:
            held.close()
        elif held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listener = held
            listener.setblocking(True)
        else:
            # Of callers who still think that they speak to the agent.
            try:
                held.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
    return listener


def context(keys, whose):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.load_cert_chain(f"{keys}/{whose}.pem")
    made.set_alpn_protocols(["http/1.1"])
    return made


def request(tls):
    """The target of a request, whose body, if it is small, is read too; none at the end."""
    head = b""
    while b"\r\n\r\n" not in head:
        got = tls.recv(4096)
        if not got:
            return None
        head += got
    head, _, body = head.partition(b"\r\n\r\n")
    length = [int(l.split(b":")[1]) for l in head.lower().split(b"\r\n") if l.startswith(b"content-length:")]
    while length and length[0] < 1 << 16 and len(body) < length[0]:
        body += tls.recv(4096)
    return urllib.parse.unquote(head.split(b" ")[1].decode())


class Agent:
    def __init__(self, keys):
        self.keys, self.armed, self.api, self.reply = keys, [], None, None
        self.tls = context(keys, "own")
        self.port = next(of_agent(lambda link: link.startswith("/dev/vport")))
        bomb = zlib.compressobj(1, wbits=31)
        bomb = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(32)) + bomb.flush()
        ROWS["a gzip bomb"] = (go_on, whole(bomb, b"content-encoding: gzip\r\n"))

    def serve(self, listener):
        threading.Thread(target=self.hear, daemon=True).start()
        while True:
            raw, _ = listener.accept()
            threading.Thread(target=self.meet, args=(raw,), daemon=True).start()

    def hear(self):
        """What vmctl says."""
        heard = b""
        while True:
            got = os.read(self.port, 4096)
            heard += got
            *messages, heard = heard.split(b"\n")
            for message in map(json.loads, messages):
                kind, reply = REPLIES.get(self.reply, (None, None))
                if message["type"] == kind:
                    self.say(reply(message.get("number")))
            if not got:
                # Nobody is there, for the moment.
                time.sleep(0.01)

    def meet(self, raw):
        try:
            raw.settimeout(60)
            if self.armed:
                return ARMS[self.armed.pop()](raw, self.keys)
            with self.tls.wrap_socket(raw, server_side=True) as tls:
                while self.answer(tls):
                    pass
                tls.unwrap()
        except (OSError, ValueError):
            pass
        finally:
            raw.close()

    def answer(self, tls):
        """Whether the connection goes on."""
        target = request(tls)
        if target is None:
            return False
        _, verb, name = (target + "//").split("/", 2)
        name = name.rstrip("/")
        if verb in ("exec", "files"):
            verb, name = "row", self.api
        if verb == "row":
            how, said = ROWS[name]
            return how(tls, said)
        if verb == "arm":
            self.armed.append(name)
            tls.sendall(whole(PLAIN, b"connection: close\r\n"))
            return False
        if verb == "api":
            self.api = name
        elif verb == "channel":
            writing = threading.Thread(target=self.say, args=(CHANNEL[name],), daemon=True)
            writing.start()
            writing.join(2)
        elif verb == "reply":
            self.reply = name
        tls.sendall(whole(PLAIN))
        return True

    def say(self, text):
        while text:
            text = text[os.write(self.port, text):]


def identity():
    area = mmap.mmap(-1, 17 * 4096)
    os.preadv(os.open("/dev/vdb", os.O_RDONLY | os.O_DIRECT), [area], 0)
    assert area[:8] == b"CMIDENT1", area[:8]
    return area[12:12 + int.from_bytes(area[8:12], "big")].decode()


def main(what, keys=None):
    if what == "identity":
        print(identity())
    elif what == "names":
        for table in (ARMS, ROWS, CHANNEL, REPLIES):
            print("|".join(table))
    else:
        agent = Agent(keys)
        # Whoever asked for this has had his answer by then.
        time.sleep(1)
        stop_agent()
        agent.serve(take_port())


main(*sys.argv[1:])
