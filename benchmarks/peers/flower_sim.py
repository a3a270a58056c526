"""Flower's simulation (Ray backend) with its FedAvg, without training.

A client decodes the parameters to numpy, as any client that trains must, and sends them back. A round is what FedAvg
does between configuring the clients and the aggregated result; Flower's start is not part of it. The server part is the
process that calls `run_simulation`: it holds the ServerApp, the strategy and the message store. Run with the
interpreter that `benchmarks.peers.flower_python()` names: `PYTHON -m benchmarks.peers.flower_sim`; prints one JSON
line (`PeerRun`).
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.memory import MemorySampler
from benchmarks.peers import LAYERS, MEMORY_ROUNDS, PeerOptions, PeerRun


class Stopwatch(FedAvg):
    """FedAvg that times its rounds and has the memory rounds sampled."""

    def __init__(self, options: PeerOptions) -> None:
        super().__init__(
            fraction_evaluate=0.0, min_train_nodes=options.clients, min_available_nodes=options.clients
        )
        self.options = options
        self.seconds: list[float] = []
        self.light = MemorySampler(os.getpid())
        self.walked = MemorySampler(os.getpid(), walk=True)
        self.tree = MemorySampler(os.getpid(), tree=True, walk=True)
        self.sampling = ExitStack()
        self._started = 0.0

    def configure_train(self, server_round: int, *args: Any, **kwargs: Any) -> Any:
        """Note the start of a round."""
        if server_round == 1:
            self.sampling.enter_context(self.light)
        if server_round == self.options.rounds + 1:
            self.sampling.close()
            self.sampling.enter_context(self.walked)
            self.sampling.enter_context(self.tree)
        self._started = time.perf_counter()
        return super().configure_train(server_round, *args, **kwargs)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Note the end of a round."""
        result = super().aggregate_train(server_round, replies)
        if server_round <= self.options.rounds:
            self.seconds.append(time.perf_counter() - self._started)
        return result


def initial_model(options: PeerOptions) -> list[npt.NDArray[np.float32]]:
    """The parameters that the rounds start from; made again for the check, so that nobody keeps them."""
    generator = np.random.default_rng(0)
    return [generator.standard_normal(options.parameters // LAYERS, dtype=np.float32) for _ in range(LAYERS)]


def play(options: PeerOptions) -> PeerRun:
    """Run the simulation, check the mean."""
    client, server = ClientApp(), ServerApp()
    strategy = Stopwatch(options)
    results: list[ArrayRecord] = []

    @client.train()
    def train(message: Message, _: Context) -> Message:
        arrays = message.content["arrays"].to_numpy_ndarrays()
        reply = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
        return Message(content=RecordDict(reply), reply_to=message)

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        rounds = options.rounds + MEMORY_ROUNDS
        result = strategy.start(
            grid=grid, initial_arrays=ArrayRecord(initial_model(options)), num_rounds=rounds
        )
        results.append(result.arrays)

    with strategy.sampling:
        run_simulation(
            server,
            client,
            num_supernodes=options.clients,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
    for before, after in zip(initial_model(options), results[0].to_numpy_ndarrays(), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5)  # the mean of equal parameters is the same again
    return PeerRun(
        peer=f"flower {version('flwr')}, ray {version('ray')}",
        options=options,
        round_s=strategy.seconds,
        server_start=strategy.light.start,
        server_peak=strategy.light.peak.peak(strategy.walked.peak),
        tree_peak=strategy.tree.peak,
    )


if __name__ == "__main__":
    print(play(PeerOptions.parse("Flower's simulation: FedAvg, no training.")).to_json())
