"""Links of a chosen latency and rate between the hosts of a `hosts.Network`.

    with hosts.Network(folder, names) as network, links.Links(network.hosts) as net:
        net.shape(latency_s=0.001, bytes_per_s=125e6)

Each host gets a second network card, a TUN device. What it sends goes through one process, the
relay, which holds every packet for as long as a link from the host to a switch would: until the
packets before it have left at the link's rate, and then for its latency. No packet is lost, and
queues have no end. Linux's own netem does the same, where the kernel has it.

The relay needs about 10 µs of processor time a packet (of up to 64 KiB: the cards take segments
that TCP has not cut up yet), so a latency below 0.1 ms and more than about 10 Gbit/s are out of
its reach; measure what a link does before believing what it was told.
"""

import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time

_CARD = "link0"
_NETWORK = "10.78.0"
# linux/if_tun.h. With IFF_VNET_HDR each packet comes with a header of 10 bytes that says where its
# checksum is still to be put and how it is to be cut; the other card takes it as it is.
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_CHECKSUM_AND_TSO4 = 0x01 | 0x02
_VNET_HEADER = 10
_CLONE_NEWNET = 0x40000000
_PR_SET_TIMERSLACK = 29
_LARGEST_PACKET = 1 << 17
_PACKETS_AT_A_TIME = 32


class Links:
    """The relay and the cards; a context manager.

    Attributes:
        addresses: of the hosts, on these links.
    """

    def __init__(self, hosts):
        self._hosts = hosts
        self.addresses = [f"{_NETWORK}.{number}" for number in range(1, len(hosts) + 1)]

    def __enter__(self):
        self._relay = subprocess.Popen(
            [sys.executable, __file__, *(str(host.pid) for host in self._hosts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if self._relay.stdout.readline() != b"ready\n":
            self.__exit__()
            raise RuntimeError("the relay does not start; it needs root and /dev/net/tun")
        for host, address in zip(self._hosts, self.addresses, strict=True):
            host.run(["ip", "addr", "add", f"{address}/24", "dev", _CARD])
            host.run(["ip", "link", "set", _CARD, "txqueuelen", "10000", "up"])
        return self

    def __exit__(self, *_):
        self._relay.stdin.close()  # ends it
        self._relay.wait(10)
        self._relay.stdout.close()

    def shape(self, *, latency_s, bytes_per_s):
        """How long each packet takes one way, and how fast a host can send, from now on."""
        self._relay.stdin.write(f"{latency_s} {bytes_per_s}\n".encode())
        self._relay.stdin.flush()
        self._relay.stdout.readline()


def open_card(pid):
    """Makes the card in the network of process `pid`; returns its other end, a descriptor."""
    with open(f"/proc/{pid}/ns/net") as network:
        if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"no way into the network of process {pid}")
    card = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(card, _TUNSETIFF, struct.pack("16sH22x", _CARD.encode(), flags))
    fcntl.ioctl(card, _TUNSETOFFLOAD, _CHECKSUM_AND_TSO4)
    return card


def relay(cards):
    """Passes packets on between the cards until standard input ends."""
    latency_s, bytes_per_s = 0.0, float("inf")
    by_address = {bytes([10, 78, 0, number]): card for number, card in enumerate(cards, 1)}
    link_free_at = dict.fromkeys(cards, 0.0)
    under_way = []  # a heap of (arrival, number, card, packet)
    count = 0
    while True:
        timeout = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([0, *cards], [], [], timeout)
        for card in ready:
            if card == 0:
                if not (line := os.read(0, 1000)):
                    return
                latency_s, bytes_per_s = map(float, line.split())
                os.write(1, b"shaped\n")
                continue
            for _ in range(_PACKETS_AT_A_TIME):
                try:
                    packet = os.read(card, _LARGEST_PACKET)
                except BlockingIOError:
                    break
                to = by_address.get(packet[_VNET_HEADER + 16 : _VNET_HEADER + 20])
                if packet[_VNET_HEADER] >> 4 != 4 or to is None:
                    continue  # IPv6's neighbour discovery, say
                begin = max(time.monotonic(), link_free_at[card])
                link_free_at[card] = begin + (len(packet) - _VNET_HEADER) / bytes_per_s
                count += 1
                heapq.heappush(under_way, (link_free_at[card] + latency_s, count, to, packet))
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, _, to, packet = heapq.heappop(under_way)
            os.write(to, packet)


def main():
    cards = [open_card(pid) for pid in sys.argv[1:]]
    # Timers are late by 50 µs otherwise; and it must not wait for a processor behind the workers.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    os.nice(-15)
    os.write(1, b"ready\n")
    relay(cards)


if __name__ == "__main__":
    main()
