"""Peers that the round benchmarks stand beside, each a script that prints one JSON line.

A peer runs in a fresh process, with its own Ray, so that nothing of it stays behind in the benchmark. It plays rounds
of federated averaging without training and measures itself in the same way as every other peer (`PeerRun`).
Standard library only: Flower's environment imports this package too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.memory import Memory

__all__ = [
    "LAYERS",
    "MEMORY_ROUNDS",
    "PeerError",
    "PeerOptions",
    "PeerRun",
    "flower_python",
    "last_line",
    "requirements_digest",
    "run_peer",
]

LAYERS = 10  # arrays that a peer cuts the model into
MEMORY_ROUNDS = 3

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-peers"
REQUIREMENTS = Path(__file__).with_name("requirements-flower.txt")
INSTALLED = ENVIRONMENT / "installed.txt"


class PeerError(RuntimeError):
    """A peer's process failed; the message holds the end of what it said."""


@dataclass(frozen=True)
class PeerOptions:
    """What a peer plays.

    Attributes:
        params_millions: fp32 parameters of the model, in millions.
        clients: regions (Flower's word is client).
        rounds: rounds, of which the first warms up and is dropped from the means.
    """

    params_millions: float = 25.0
    clients: int = 3
    rounds: int = 6

    def __post_init__(self) -> None:
        if self.params_millions <= 0 or self.clients < 1 or self.rounds < 2:
            raise ValueError(
                "a peer needs params_millions > 0, clients >= 1 and rounds >= 2 (the first warms up)"
            )

    @property
    def parameters(self) -> int:
        """Number of parameters, cut to a multiple of `LAYERS`."""
        return int(self.params_millions * 1e6) // LAYERS * LAYERS

    def arguments(self) -> list[str]:
        """The command line that `parse` reads back."""
        return [f"--{key.replace('_', '-')}={value}" for key, value in asdict(self).items()]

    @classmethod
    def parse(cls, description: str, arguments: Sequence[str] | None = None) -> PeerOptions:
        """Options of a peer's command line (`sys.argv` by default)."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--params-millions", type=float, default=cls.params_millions)
        parser.add_argument("--clients", type=int, default=cls.clients)
        parser.add_argument("--rounds", type=int, default=cls.rounds)
        return cls(**vars(parser.parse_args(arguments)))


@dataclass(frozen=True)
class PeerRun:
    """What one run of a peer measured; every peer plays `MEMORY_ROUNDS` more, untimed, for what is dear to sample.

    Attributes:
        peer: name and version, for example "flower 1.42.0".
        options: what it played.
        round_s: wall seconds of every timed round, the first included.
        server_start: memory of the server part, the process that averages, before the first round.
        server_peak: its peaks; anonymous memory and RSS over all rounds, USS and PSS over the memory rounds.
        tree_peak: the peer's whole process tree with Ray's own processes, over the memory rounds.
        steady_mean_s, steady_median_s: of a timed round, the first left out.
    """

    peer: str
    options: PeerOptions
    round_s: list[float]
    server_start: Memory
    server_peak: Memory
    tree_peak: Memory
    steady_mean_s: float = field(init=False)
    steady_median_s: float = field(init=False)

    def __post_init__(self) -> None:
        assert len(self.round_s) == self.options.rounds
        object.__setattr__(self, "steady_mean_s", round(statistics.fmean(self.round_s[1:]), 4))
        object.__setattr__(self, "steady_median_s", round(statistics.median(self.round_s[1:]), 4))

    def to_json(self) -> str:
        """One line; `from_json` reads it back."""
        return json.dumps(asdict(self) | {"round_s": [round(seconds, 4) for seconds in self.round_s]})

    @classmethod
    def from_json(cls, line: str) -> PeerRun:
        """Reads a line of `to_json`; the means are computed again."""
        values = json.loads(line)
        memory = {key: Memory(**values[key]) for key in ("server_start", "server_peak", "tree_peak")}
        return cls(values["peer"], PeerOptions(**values["options"]), values["round_s"], **memory)


def requirements_digest() -> str:
    """SHA-256 of the pins, comments aside, which the installer leaves in the environment it made."""
    lines = REQUIREMENTS.read_text().splitlines()
    pins = "\n".join(line for line in lines if line and not line.startswith("#"))
    return hashlib.sha256(pins.encode()).hexdigest()


def flower_python() -> Path | None:
    """Interpreter of the environment that holds Flower; None if it is missing, half made or of other pins."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists() or not INSTALLED.exists():
        return None
    return python if INSTALLED.read_text().strip() == requirements_digest() else None


def run_peer(name: str, python: Path, options: PeerOptions, timeout_s: float = 900.0) -> PeerRun:
    """Run `benchmarks.peers.NAME` in a process of its own.

    Args:
        name: module of this package, `plain_ray` or `flower_sim`.
        python: interpreter, `Path(sys.executable)` for plain Ray and `flower_python()` for Flower.
        options: what to play.
        timeout_s: after which the peer is killed.

    Raises:
        PeerError: it failed, or took longer than `timeout_s`.
    """
    return PeerRun.from_json(last_line(name, python, options.arguments(), timeout_s))


def last_line(name: str, python: Path, arguments: Sequence[str], timeout_s: float = 900.0) -> str:
    """Run a module of this package in a process of its own; the last JSON line that it printed.

    Raises:
        PeerError: it failed, or took longer than `timeout_s`.
    """
    command = [str(python), "-m", f"benchmarks.peers.{name}", *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"{name}: no result after {timeout_s:.0f} s") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise PeerError(f"{name} ended with status {done.returncode}:\n{said}")
    return lines[-1]
