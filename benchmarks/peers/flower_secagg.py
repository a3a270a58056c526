"""What a client of Flower's SecAgg+ spends on one update: quantising, masking, serialising.

The functions are Flower's own, called in the order of its protocol, with every client a neighbour of every other and the
defaults of its workflow (clip 8, 22 bits, ring 2^32). Run with the interpreter that `benchmarks.peers.flower_python()`
names; prints one JSON line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import time
from importlib.metadata import version

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import Key

# The package exports a function under this module's name.
mod = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")


def main() -> None:
    """Mask one update for each of some clients; CPU seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params-millions", type=float, default=4.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    size, ids = int(options.params_millions * 1e6), list(range(11, 11 + options.clients))
    settings = {
        Key.SAMPLE_NUMBER: len(ids),
        Key.SHARE_NUMBER: len(ids),
        Key.THRESHOLD: len(ids) // 2 + 1,
        Key.CLIPPING_RANGE: 8.0,
        Key.TARGET_RANGE: 1 << 22,
        Key.MOD_RANGE: 1 << 32,
        Key.MAX_WEIGHT: 1000.0,
    }
    states, keys = {node: mod.SecAggPlusState() for node in ids}, {}
    for node, state in states.items():
        state.nid = node
        said = mod._setup(state, settings)
        keys[str(node)] = (said[Key.PUBLIC_KEY_1], said[Key.PUBLIC_KEY_2])
    sealed: dict[int, tuple[list[bytes], list[int]]] = {node: ([], []) for node in ids}
    for node, state in states.items():
        said = mod._share_keys(state, dict(keys))
        for target, text in zip(said[Key.DESTINATION_LIST], said[Key.CIPHERTEXT_LIST], strict=True):
            sealed[target][0].append(text)
            sealed[target][1].append(node)
    update = np.random.default_rng(0).standard_normal(size).astype(np.float32) * np.float32(0.02)
    seconds, wire = [], 0
    for node in ids[: options.turns]:
        parameters = ndarrays_to_parameters([update])
        asked = {Key.CIPHERTEXT_LIST: sealed[node][0], Key.SOURCE_LIST: sealed[node][1]}
        began = time.process_time()
        said = mod._collect_masked_vectors(states[node], asked, 1000, parameters)
        seconds.append(time.process_time() - began)
        wire = sum(len(part) for part in said[Key.MASKED_PARAMETERS])
    found = {
        "peer": f"flower {version('flwr')}",
        "client_mb_per_s": update.nbytes / statistics.median(seconds) / 1e6,
        "wire_ratio": wire / update.nbytes,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
