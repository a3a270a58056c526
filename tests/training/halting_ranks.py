"""One rank that steps until its pool agrees to stop; says at which step that was.

python -m tests.training.halting_ranks PORT RANK TELLING_RANK TELLING_STEP
"""

from __future__ import annotations

import os
import random
import sys
import time

import torch
import torch.distributed as dist

from xcloud.training.halting import Halt

STEPS = 50


def main(port: int, rank: int, telling: int, at: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    halt = Halt(2)
    jitter = random.Random(rank)
    stops = []
    for _ in range(2):  # a round that is ended early, and the next: the word stands
        done = 0
        for step in range(STEPS):
            if step and halt.agreed():
                break
            if rank == telling and step == at:
                halt.tell()
            time.sleep(jitter.random() / 200)
            dist.all_reduce(torch.ones(3))  # the ranks' gradients
            done += 1
        halt.close()
        stops.append(done)
    print(*stops)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
