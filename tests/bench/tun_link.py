"""A wide-area link between two network namespaces whose ends are the kernel's own TCP. Linux, as root.

    NAME-a  10.77.0.1 ── tun ──► queue, rate, delay, loss (this process) ──► tun ── 10.77.0.2  NAME-b

Packets that find the queue full are dropped, as a router does: congestion control sees what it would see on a real
link. For kernels without netem. Without loss the kernel hands over packets of up to 64 KiB that it would cut into
segments (TSO, with the checksum left out), and takes them as they are at the other end: one process then forwards some
Gbit/s. They take the time of all their segments with a header each, and are dropped whole. With loss each segment is
its own packet: some 60,000 a second.

    python -m tests.bench.tun_link --name hx --rate-mbit 100 --rtt-ms 100 --loss 0.001

prints one JSON line when the namespaces are up, and removes them when its standard input ends.
"""

import argparse
import fcntl
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field

ADDRESSES = ("10.77.0.1", "10.77.0.2")
SYSCTLS = (
    "net.ipv4.tcp_rmem=4096 131072 67108864",
    "net.ipv4.tcp_wmem=4096 65536 67108864",
    "net.ipv4.tcp_notsent_lowat=1048576",
)
"""What deploy/systemd/90-heterorl-network.conf sets, as far as a namespace has it, but congestion control."""
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_TUN_FLAGS = 0x0001 | 0x1000 | 0x4000  # IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
_SEGMENTING = 0x01 | 0x02  # TUN_F_CSUM | TUN_F_TSO4
_VNET_HEADER = struct.Struct("<BBHHHH")
"""virtio_net_hdr: flags, type of segmenting (0: none), length of headers, segment's payload, two for the checksum."""
_MAX_PACKET = 65536 + _VNET_HEADER.size
_BATCH = 64


@dataclass(slots=True)
class Direction:
    """One way over the link: what is under way, and when the wire is free again."""

    source: int
    target: int
    free_at: float = 0.0
    under_way: deque[tuple[float, bytes]] = field(default_factory=deque[tuple[float, bytes]])
    dropped: int = 0


def sh(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def open_tun(name: str, segmenting: bool) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22s", name.encode(), _TUN_FLAGS, b""))
    fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _SEGMENTING if segmenting else 0)
    return descriptor


def wire_bytes(packet: bytes) -> int:
    """Of all segments that a packet stands for, each with its headers of IPv4 and TCP."""
    _, kind, _, segment, _, _ = _VNET_HEADER.unpack_from(packet)
    size = len(packet) - _VNET_HEADER.size
    if not kind:
        return size
    ip = 4 * (packet[_VNET_HEADER.size] & 0x0F)
    headers = ip + 4 * (packet[_VNET_HEADER.size + ip + 12] >> 4)
    return size + (-(-(size - headers) // segment) - 1) * headers


def make_namespace(
    namespace: str, device: str, address: str, peer: str, mtu: int, congestion: str, segmenting: bool
) -> int:
    """The namespace with its end of the link up; returns the device's descriptor."""
    sh("ip", "netns", "add", namespace)
    descriptor = open_tun(device, segmenting)
    sh("ip", "link", "set", device, "netns", namespace)
    inside = ("ip", "netns", "exec", namespace)
    sh(*inside, "ip", "link", "set", "lo", "up")
    sh(*inside, "ip", "link", "set", device, "mtu", str(mtu), "txqueuelen", "10000")
    sh(*inside, "ip", "address", "add", address, "peer", peer, "dev", device)
    sh(*inside, "ip", "link", "set", device, "up")
    for setting in (f"net.ipv4.tcp_congestion_control={congestion}", *SYSCTLS):
        sh(*inside, "sysctl", "-w", setting)
    return descriptor


def forward(ways: tuple[Direction, Direction], rate_bit_s: float, delay_s: float, loss: float, queue_s: float) -> None:
    """Until standard input ends."""
    draws = random.Random(1)
    poll = select.poll()
    for descriptor in (ways[0].source, ways[1].source, sys.stdin.fileno()):
        poll.register(descriptor, select.POLLIN)
    while True:
        heads = [way.under_way[0][0] for way in ways if way.under_way]
        wait_s = max(0.0, min(heads) - time.monotonic()) if heads else 1.0
        for descriptor, _ in poll.poll(wait_s * 1e3):
            if descriptor == sys.stdin.fileno():
                return
            way = ways[0] if descriptor == ways[0].source else ways[1]
            take(way, rate_bit_s, delay_s, queue_s, draws if loss else None, loss)
        now = time.monotonic()
        for way in ways:
            while way.under_way and way.under_way[0][0] <= now:
                try:
                    os.write(way.target, way.under_way.popleft()[1])
                except BlockingIOError:
                    way.dropped += 1


def take(
    way: Direction, rate_bit_s: float, delay_s: float, queue_s: float, draws: random.Random | None, loss: float
) -> None:
    """Reads what is there, up to a batch, and puts it on the wire or drops it."""
    for _ in range(_BATCH):
        try:
            packet = os.read(way.source, _MAX_PACKET)
        except BlockingIOError:
            return
        now = time.monotonic()
        start = max(now, way.free_at)
        if start - now > queue_s or (draws is not None and draws.random() < loss):
            way.dropped += 1
            continue
        way.free_at = start + wire_bytes(packet) * 8 / rate_bit_s
        way.under_way.append((way.free_at + delay_s, packet))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="heterorl-bench")
    parser.add_argument("--rate-mbit", type=float, required=True)
    parser.add_argument("--rtt-ms", type=float, required=True)
    parser.add_argument("--loss", type=float, default=0.0, help="chance of a packet to be lost")
    parser.add_argument("--mtu", type=int, default=1500)
    parser.add_argument("--queue-ms", type=float, default=100.0, help="the router's buffer, in time at full rate")
    parser.add_argument("--congestion", default="bbr", help="the kernel's congestion control")
    arguments = parser.parse_args()
    namespaces = [f"{arguments.name}-a", f"{arguments.name}-b"]
    try:
        devices = (f"tuna{os.getpid()}", f"tunb{os.getpid()}")
        first, second = (
            make_namespace(
                namespace, device, address, peer, arguments.mtu, arguments.congestion, segmenting=not arguments.loss
            )
            for namespace, device, address, peer in zip(namespaces, devices, ADDRESSES, ADDRESSES[::-1], strict=True)
        )
        print(json.dumps({"namespaces": namespaces, "addresses": ADDRESSES}), flush=True)
        ways = (Direction(first, second), Direction(second, first))
        forward(ways, arguments.rate_mbit * 1e6, arguments.rtt_ms / 2e3, arguments.loss, arguments.queue_ms / 1e3)
    finally:
        for namespace in namespaces:
            subprocess.run(("ip", "netns", "delete", namespace), check=False, capture_output=True)


if __name__ == "__main__":
    main()
