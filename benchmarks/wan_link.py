"""A wide-area link in user space: delay, rate and loss between network namespaces, for kernels without netem.

Each site has a TUN device; this process holds them all, reads the packets that a site sends, and writes them to the
site that they are for, later. For each direction between two sites there is a queue with a rate (packets leave one
after the other), a bound (what would wait longer than a round trip is dropped, as in a router's buffer), a loss (each
packet alone) and a delay. Order is kept. Needs root and /dev/net/tun.

    python -m benchmarks.wan_link CONFIG.json     ends on SIGTERM; SIGHUP reads the links again; SIGUSR1 writes statistics
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Emulator", "Link", "Shape"]

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PACKET = 65536
LEAST_QUEUE_S = 0.02


@dataclass(frozen=True)
class Shape:
    """How a link is, in each direction.

    Attributes:
        rtt_ms: delay of both directions together, beyond what queues add.
        rate_mbit_per_s: of each direction; 0: unlimited.
        loss_percent: of packets, each alone.
    """

    rtt_ms: float = 0.0
    rate_mbit_per_s: float = 0.0
    loss_percent: float = 0.0


@dataclass
class Link:
    """One direction between two sites: its queue, and what has gone through it.

    Attributes:
        free_at: when the last packet that was taken will have left.
        carried: bytes that have arrived, headers of IP and TCP included.
        lost: packets, by chance.
        dropped: packets, for want of room in the queue.
    """

    shape: Shape
    free_at: float = 0.0
    queue: deque[tuple[float, bytes]] = field(default_factory=deque)
    packets: int = 0
    carried: int = 0
    lost: int = 0
    dropped: int = 0

    def take(self, packet: bytes, now: float, chance: float) -> None:
        """Queue a packet, or lose it; `chance` is uniform in [0, 1)."""
        shape = self.shape
        if chance * 100 < shape.loss_percent:
            self.lost += 1
            return
        start = max(now, self.free_at)
        if shape.rate_mbit_per_s:
            if start - now > max(shape.rtt_ms / 1e3, LEAST_QUEUE_S):
                self.dropped += 1
                return
            self.free_at = start + len(packet) * 8e-6 / shape.rate_mbit_per_s
        else:
            self.free_at = start
        self.queue.append((self.free_at + shape.rtt_ms / 2e3, packet))

    def due(self, now: float) -> bytes | None:
        """The next packet whose time has come."""
        if self.queue and self.queue[0][0] <= now:
            packet = self.queue.popleft()[1]
            self.packets += 1
            self.carried += len(packet)
            return packet
        return None


class Emulator:
    """All links between some sites.

    Args:
        config: the file: `sites` (name to `space`, a namespace or null for the one of this process, `device` and
            `address`), `shape` of every link, and the file to write `statistics` to.
    """

    def __init__(self, config: Path) -> None:
        self._config = config
        read = self._read()
        self._statistics = Path(read["statistics"])
        self._sites = {socket.inet_aton(site["address"]): name for name, site in read["sites"].items()}
        self._devices = {
            name: open_tun(site["device"], site["space"]) for name, site in read["sites"].items()
        }
        shape = Shape(**read["shape"])
        self._links = {(a, b): Link(shape) for a in self._devices for b in self._devices if a != b}
        self._asked: set[int] = set()

    def _read(self) -> Mapping[str, Any]:
        return dict(json.loads(self._config.read_text()))

    def run(self) -> None:
        """Forward packets until SIGTERM."""
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        poll = select.epoll()
        names = {device: name for name, device in self._devices.items()}
        for device in names:
            poll.register(device, select.EPOLLIN)
        print("ready", flush=True)
        while not self._ended():
            self._answer()
            after = self._send()
            for device, _ in poll.poll(after):
                self._receive(names[device], device)
        self.write_statistics()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._asked.add(number)

    def _ended(self) -> bool:
        return bool(self._asked & {signal.SIGTERM, signal.SIGINT})

    def _answer(self) -> None:
        if signal.SIGHUP in self._asked:
            self._asked.discard(signal.SIGHUP)
            shape = Shape(**self._read()["shape"])
            for link in self._links.values():
                link.shape = shape
        if signal.SIGUSR1 in self._asked:
            self._asked.discard(signal.SIGUSR1)
            self.write_statistics()

    def _send(self) -> float:
        """Write what is due; returns the seconds until the next packet is, at most half a second."""
        now = time.monotonic()
        soonest = now + 0.5
        for (_, to), link in self._links.items():
            device = self._devices[to]
            while (packet := link.due(now)) is not None:
                try:
                    os.write(device, packet)
                except OSError:  # its device is down or full: the packet is lost, as on a road
                    link.lost += 1
            if link.queue:
                soonest = min(soonest, link.queue[0][0])
        return max(0.0, soonest - time.monotonic())

    def _receive(self, name: str, device: int) -> None:
        now, links, sites = time.monotonic(), self._links, self._sites
        for _ in range(64):
            try:
                packet = os.read(device, PACKET)
            except BlockingIOError:
                return
            to = sites.get(packet[16:20]) if packet[0] >> 4 == 4 else None
            if to is not None and to != name:
                links[name, to].take(packet, now, random.random())

    def write_statistics(self) -> None:
        """What has gone through each link so far."""
        counted = {
            f"{a}>{b}": {key: value for key, value in asdict(link).items() if isinstance(value, int)}
            for (a, b), link in self._links.items()
        }
        draft = self._statistics.with_suffix(".new")
        draft.write_text(json.dumps(counted))
        draft.replace(self._statistics)


def open_tun(device: str, space: str | None) -> int:
    """A new TUN device in a network namespace; returns a file descriptor that does not block.

    Raises:
        OSError: no right, no such namespace, or no TUN in this kernel.
    """
    library = ctypes.CDLL(None, use_errno=True)

    def enter(descriptor: int) -> None:
        if library.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {space!r} failed")

    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        if space is not None:
            there = os.open(f"/run/netns/{space}", os.O_RDONLY)
            try:
                enter(there)
            finally:
                os.close(there)
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
    finally:
        enter(home)
        os.close(home)
    return tun


if __name__ == "__main__":
    Emulator(Path(sys.argv[1])).run()
