"""Sites with a link of their own, on one machine: network namespaces with one raylet in each.

A `Wan` is a hub, where the Ray head and the driver are, and a namespace for each site with a raylet in it, labelled
`site=NAME`. Its cables come in two kinds:

* `ShapedCables`: a bridge and virtual cables, whose rate the kernel limits (tc tbf), up and down apart from each other.
  There is no delay and no loss.
* `EmulatedCables`: delay, rate and loss from every site to every other, by a process of ours (`benchmarks.wan_link`):
  many kernels have no netem.

Both need root and `ip` (Debian: iproute2), the first also `tc`, the second /dev/net/tun; the kernel's own TCP does the
rest.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import psutil

from benchmarks.harness import BenchmarkError
from benchmarks.wan_link import Shape
from xcloud.quiet import quiet_environment

__all__ = ["EmulatedCables", "ShapedCables", "Wan", "emulated_wan", "wan", "why_not"]

PORT = 6391
STORE_BYTES = 512 << 20


class Cables(Protocol):
    """How sites are connected.

    Attributes:
        hub: address of the hub, which lies in this process's own namespace.
        spaces: the sites' namespaces, by name.
    """

    hub: str
    spaces: dict[str, str]

    def lay(self) -> None:
        """Make namespaces and devices."""

    def address(self, site: str) -> str:
        """Of a site."""

    def cut(self) -> None:
        """Take away what `lay` has made, as far as it came."""


class ShapedCables:
    """A bridge, and a virtual cable to each site, whose rate the kernel limits."""

    BRIDGE, NETWORK = "xcwan", "10.78.0"

    def __init__(self, sites: Sequence[str]) -> None:
        self.hub = f"{self.NETWORK}.1"
        self.spaces = {name: f"xcwan{number}" for number, name in enumerate(sites, start=2)}

    def address(self, site: str) -> str:
        return f"{self.NETWORK}.{self.spaces[site].removeprefix('xcwan')}"

    def lay(self) -> None:
        _run("ip", "link", "add", self.BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{self.hub}/24", "dev", self.BRIDGE)
        _run("ip", "link", "set", self.BRIDGE, "up")
        for site, space in self.spaces.items():
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", f"{space}h", "type", "veth", "peer", "name", "wan0", "netns", space)
            _run("ip", "link", "set", f"{space}h", "master", self.BRIDGE, "up")
            inside = ("ip", "netns", "exec", space)
            _run(*inside, "ip", "addr", "add", f"{self.address(site)}/24", "dev", "wan0")
            _run(*inside, "ip", "link", "set", "wan0", "up")
            _run(*inside, "ip", "link", "set", "lo", "up")

    def shape(self, mbit_per_s: float) -> None:
        """Give every site's link this rate, in each direction."""
        rate = ("rate", f"{mbit_per_s:.3f}mbit", "burst", "64kb", "latency", "400ms")
        for space in self.spaces.values():
            _run("tc", "qdisc", "replace", "dev", f"{space}h", "root", "tbf", *rate)
            _run("ip", "netns", "exec", space, "tc", "qdisc", "replace", "dev", "wan0", "root", "tbf", *rate)

    def cut(self) -> None:
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self.BRIDGE], capture_output=True, check=False)


class EmulatedCables:
    """A link with delay, rate and loss between any two of the hub and the sites.

    Args:
        shape: of every link.
        folder: for the emulator's files.
    """

    DEVICE, NETWORK, HUB_NAME = "xctun", "10.79", "hub"

    def __init__(self, sites: Sequence[str], shape: Shape, folder: Path) -> None:
        self.hub = f"{self.NETWORK}.1.1"
        self.spaces = {name: f"xctun{number}" for number, name in enumerate(sites, start=2)}
        self._shape = shape
        self._config, self._statistics = folder / "links.json", folder / "statistics.json"
        self._emulator: subprocess.Popen[str] | None = None

    def address(self, site: str) -> str:
        return f"{self.NETWORK}.{self.spaces[site].removeprefix('xctun')}.1"

    def lay(self) -> None:
        for space in self.spaces.values():
            _run("ip", "netns", "add", space)
        sites: dict[str, Any] = {
            name: {"space": space, "device": "wan0", "address": self.address(name)}
            for name, space in self.spaces.items()
        }
        sites[self.HUB_NAME] = {"space": None, "device": self.DEVICE, "address": self.hub}
        settings = {"sites": sites, "shape": asdict(self._shape), "statistics": str(self._statistics)}
        self._config.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "benchmarks.wan_link", str(self._config)]
        root = Path(__file__).parents[1]
        self._emulator = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
        assert self._emulator.stdout is not None
        if self._emulator.stdout.readline().strip() != "ready":
            raise BenchmarkError(f"the link emulator did not start (exit status {self._emulator.wait(10)})")
        for site in sites.values():
            space, device = site["space"], site["device"]
            inside = ("ip", "netns", "exec", space) if space else ()
            _run(*inside, "ip", "link", "set", "lo", "up")
            _run(*inside, "ip", "addr", "add", f"{site['address']}/32", "dev", device)
            _run(*inside, "ip", "link", "set", device, "mtu", "1500", "txqueuelen", "2000", "up")
            _run(*inside, "ip", "route", "add", f"{self.NETWORK}.0.0/16", "dev", device)

    def statistics(self) -> dict[str, dict[str, int]]:
        """Packets, bytes, losses and drops so far, by `SITE>SITE`; the hub is `hub`."""
        assert self._emulator is not None
        self._statistics.unlink(missing_ok=True)
        self._emulator.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not self._statistics.exists():
            if time.monotonic() > deadline or self._emulator.poll() is not None:
                raise BenchmarkError("the link emulator does not answer")
            time.sleep(0.05)
        return dict(json.loads(self._statistics.read_text()))

    def cut(self) -> None:
        if self._emulator is not None:
            self._emulator.terminate()
            self._emulator.communicate(timeout=10)
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


C = TypeVar("C", bound=Cables)


class Wan(Generic[C]):
    """Its sites and their raylets.

    Attributes:
        address: of the Ray head.
        environment: of every process that joins; Ray reads its token when it is first imported.
    """

    def __init__(self, cables: C, folder: Path) -> None:
        self.cables = cables
        self.folder = folder
        self.address = f"{cables.hub}:{PORT}"
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        patient = {"RAY_object_manager_pull_timeout_ms": "600000"}  # else slow pulls are asked for again
        self.environment = os.environ | quiet_environment() | secret | patient
        self._processes: list[subprocess.Popen[bytes]] = []

    def up(self) -> None:
        """Lay the cables and start the raylets."""
        self.cables.lay()
        self._start([], "--head", f"--port={PORT}", "--include-dashboard=false", node=self.cables.hub)
        for name, space in self.cables.spaces.items():
            site = (f"--address={self.address}", "--labels", f"site={name}")
            self._start(["ip", "netns", "exec", space], *site, node=self.cables.address(name))

    def down(self) -> None:
        """End what was started here, and take the cables out."""
        started = [p for process in self._processes for p in _family(process.pid)]
        for process in reversed(started):
            _signal(process, "terminate")
        _, alive = psutil.wait_procs(started, timeout=10)
        for process in alive:
            _signal(process, "kill")
        psutil.wait_procs(alive, timeout=10)
        for ended in self._processes:
            ended.wait(10)
        self.cables.cut()

    def _start(self, prefix: list[str], *arguments: str, node: str) -> None:
        ray = Path(sys.executable).with_name("ray")
        command = [*prefix, str(ray), "start", "--block", "--num-cpus=2", f"--node-ip-address={node}"]
        command += [f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats", *arguments]
        log = self.folder / f"{node}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=self.environment)
        self._processes.append(process)
        deadline = time.monotonic() + 120
        while b"Ray runtime started" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"ray did not start at {node}: {log.read_text()[-500:]}")
            time.sleep(0.2)


@contextmanager
def wan(sites: Sequence[str]) -> Iterator[Wan[ShapedCables]]:
    """Sites on cables with a rate, for a while.

    Raises:
        BenchmarkError: this needs root and iproute2, or something did not start.
    """
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        raise BenchmarkError("shaped links need root, and `ip` and `tc` (Debian: apt-get install iproute2)")
    with _up(lambda _: ShapedCables(sites), "") as network:
        yield network


@contextmanager
def emulated_wan(sites: Sequence[str], shape: Shape) -> Iterator[Wan[EmulatedCables]]:
    """Sites on links with delay, rate and loss, for a while.

    Raises:
        BenchmarkError: see `why_not`, or something did not start.
    """
    reason = why_not()
    if reason is not None:
        raise BenchmarkError(reason)
    with _up(lambda folder: EmulatedCables(sites, shape, folder), "emulated-") as network:
        yield network


def why_not() -> str | None:
    """What this machine lacks for emulated links; None if nothing."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "emulated links need root and `ip` (Debian: apt-get install iproute2)"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "emulated links need /dev/net/tun"
    probe = f"xcprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else None


@contextmanager
def _up(cables: Callable[[Path], C], prefix: str) -> Iterator[Wan[C]]:
    with tempfile.TemporaryDirectory(prefix=f"xcloud-wan-{prefix}") as name:
        network = Wan(cables(Path(name)), Path(name))
        try:
            network.up()
            yield network
        finally:
            network.down()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal(process: psutil.Process, what: str) -> None:
    try:
        getattr(process, what)()
    except psutil.NoSuchProcess:
        return
