"""Synchronous data-parallel training as recipes are held against it: a bare DeepSpeed loop over all regions' batches.

One process plays the whole group: a step trains on what every region would read in that step, in its own order, so its
gradient is the mean that ranks would have exchanged. Model, engine, optimizer, schedule and held-out text are made by the
worker that makes the regions' own; there is no round, no anchor and no outer step.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from xcloud.config import JobConfig
from xcloud.region import worker_spec
from xcloud.training.worker import RankWorker
from xcloud.transport.blobs import RayBlobs

__all__ = ["data_parallel"]


def data_parallel(job: JobConfig) -> float:
    """Train `rounds * inner.steps` steps on what all regions read together; the last held-out loss.

    Args:
        job: its regions have one pool of one rank each.
    """
    specs = [worker_spec(job, region.name, 0, 0) for region in job.regions]
    batches = [spec.engine.micro_batch for spec in specs]
    together = specs[0].engine.model_copy(update={"micro_batch": sum(batches)})
    worker = RankWorker(replace(specs[0], engine=together), RayBlobs())
    worker.start("127.0.0.1", 0)  # alone in its group: nobody listens there
    readers = [RankWorker(spec, RayBlobs()) for spec in specs]
    for reader in readers:
        reader._open_data(job.tokenizer.build())
    worker.engine.train()
    for step in range(job.rounds * job.inner.steps):
        worker._set_learning_rate(step)
        rows = [
            reader.store.train.read(reader.order.indices(step * count, count))
            for reader, count in zip(readers, batches, strict=True)
        ]
        batch = torch.from_numpy(np.concatenate(rows))
        worker.engine.backward(worker.engine(input_ids=batch, labels=batch).loss)
        worker.engine.step()
    total, tokens = worker.evaluate()
    return total / tokens
