"""Sites with a link of their own, on one machine: network namespaces, one raylet in each, shaped by the kernel.

A `Wan` is a bridge at 10.78.0.1, where the Ray head and the driver are, and a namespace for each site with a raylet
in it, labelled `site=NAME`. Each end of a site's cable is a token bucket (tc tbf), so the rate holds up and down
apart from each other. Needs root, `ip` and `tc` (Debian: iproute2); the kernel's own TCP does the rest. There is
no delay and no loss here.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.harness import BenchmarkError
from xcloud.quiet import quiet_environment

__all__ = ["Wan", "wan"]

NETWORK, HUB, PORT = "10.78.0", "10.78.0.1", 6391
BRIDGE = "xcwan"
STORE_BYTES = 512 << 20


class Wan:
    """Its sites and their links.

    Attributes:
        address: of the Ray head.
        environment: of every process that joins; Ray reads its token when it is first imported.
    """

    def __init__(self, sites: Sequence[str], folder: Path) -> None:
        self.sites = {name: f"xcwan{number}" for number, name in enumerate(sites, start=2)}
        self.folder = folder
        self.address = f"{HUB}:{PORT}"
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        patient = {"RAY_object_manager_pull_timeout_ms": "600000"}  # else slow pulls are asked for again
        self.environment = os.environ | quiet_environment() | secret | patient
        self._processes: list[subprocess.Popen[bytes]] = []

    def up(self) -> None:
        """Lay the cables and start the raylets."""
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{HUB}/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        for space in self.sites.values():
            number = space.removeprefix("xcwan")
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", f"{space}h", "type", "veth", "peer", "name", "wan0", "netns", space)
            _run("ip", "link", "set", f"{space}h", "master", BRIDGE, "up")
            inside = ("ip", "netns", "exec", space)
            _run(*inside, "ip", "addr", "add", f"{NETWORK}.{number}/24", "dev", "wan0")
            _run(*inside, "ip", "link", "set", "wan0", "up")
            _run(*inside, "ip", "link", "set", "lo", "up")
        self._start([], "--head", f"--port={PORT}", "--include-dashboard=false", node=HUB)
        for name, space in self.sites.items():
            node = f"{NETWORK}.{space.removeprefix('xcwan')}"
            site = (f"--address={self.address}", "--labels", f"site={name}")
            self._start(["ip", "netns", "exec", space], *site, node=node)

    def shape(self, mbit_per_s: float) -> None:
        """Give every site's link this rate, in each direction."""
        rate = ("rate", f"{mbit_per_s:.3f}mbit", "burst", "64kb", "latency", "400ms")
        for space in self.sites.values():
            _run("tc", "qdisc", "replace", "dev", f"{space}h", "root", "tbf", *rate)
            _run("ip", "netns", "exec", space, "tc", "qdisc", "replace", "dev", "wan0", "root", "tbf", *rate)

    def down(self) -> None:
        """End what was started here, and take the cables out."""
        started = [p for process in self._processes for p in _family(process.pid)]
        for process in reversed(started):
            _signal(process, "terminate")
        _, alive = psutil.wait_procs(started, timeout=10)
        for process in alive:
            _signal(process, "kill")
        psutil.wait_procs(alive, timeout=10)
        for space in self.sites.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)

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
def wan(sites: Sequence[str]) -> Iterator[Wan]:
    """Sites for a while.

    Raises:
        BenchmarkError: this needs root and iproute2, or something did not start.
    """
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        raise BenchmarkError("shaped links need root, and `ip` and `tc` (Debian: apt-get install iproute2)")
    with tempfile.TemporaryDirectory(prefix="xcloud-wan-") as folder:
        network = Wan(sites, Path(folder))
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
