"""Fills in the engine settings that a job leaves to the memory of its machines (`fit`), before anything starts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xcloud.config import JobConfig, PoolConfig, RegionConfig
from xcloud.cost.fit import Budget, Fitted, fit_engine
from xcloud.errors import ConfigError
from xcloud.prices import PriceBook, load_prices
from xcloud.training.settings import MuonConfig

__all__ = ["fit_pools", "memory_of"]

GIB = 2**30

Choices = Mapping[tuple[str, int], Fitted]
"""By region and number of the pool."""


def fit_pools(job: JobConfig, prices: Path | None = None) -> tuple[JobConfig, Choices]:
    """The job with the settings of each pool that has `fit`, and what was chosen. It loads torch only if there is one.

    Args:
        job: as its file says.
        prices: the user's own instances, over those that xcloud knows.

    Raises:
        ConfigError: a pool's memory is not known, or the model does not fit; names the pool.
    """
    if not any(pool.fit for region in job.regions for pool in region.pools):
        return job, {}
    models = importlib.import_module("xcloud.training.models")
    parameters, shape = models.measure_model(job.model, job.tokenizer.build().vocab_size)
    book, chosen, regions = load_prices(prices), {}, []
    for r, region in enumerate(job.regions):
        pools = []
        for p, pool in enumerate(region.pools):
            if pool.fit is not None:
                where = f"regions[{r}].pools[{p}]"
                found = fit_engine(
                    parameters,
                    shape,
                    sequence_length=job.sequence_length,
                    workers=pool.workers,
                    batch=pool.micro_batch * pool.gradient_accumulation,
                    accelerator=pool.accelerator,
                    budget=memory_of(pool, region, book, where),
                    stated={key: getattr(pool, key) for key in pool.model_fields_set},
                    refused=_refused(job),
                    where=where,
                )
                chosen[region.name, p] = found
                pool = pool.model_copy(update=found.settings() | {"fit": None})
            pools.append(pool)
        regions.append(region.model_copy(update={"pools": tuple(pools)}))
    raw: dict[str, Any] = job.model_copy(update={"regions": tuple(regions)}).model_dump(mode="json")
    return JobConfig.model_validate(raw), chosen  # checked again, as if the job file had said so


def memory_of(pool: PoolConfig, region: RegionConfig, book: PriceBook, where: str) -> Budget:
    """Memory of one worker of a pool.

    Raises:
        ConfigError: nothing says how much there is.
    """
    fit = pool.fit
    assert fit is not None
    machine = book.instance(region.cloud, pool.instance) if pool.instance is not None else None
    host_gb, device_gb = fit.host_gb, fit.device_gb
    if machine is not None:
        share = 1 / machine.count if pool.on_gpu and machine.count else min(1.0, pool.cpus / machine.cpus)
        host_gb = host_gb or machine.memory_gb * share
        device_gb = device_gb or machine.accelerator_memory_gb or None
    if not pool.on_gpu:
        if host_gb is None:
            raise ConfigError(
                f"{where}: fit needs to know the memory of a worker; expected 'instance', or fit.host_gb"
            )
        return Budget(0, int(host_gb * GIB))
    if device_gb is None:
        device_gb = min(
            (
                one.accelerator_memory_gb
                for cloud in book.clouds
                for one in book.instances(cloud)
                if one.accelerator == pool.accelerator
            ),
            default=None,
        )
    if device_gb is None:
        raise ConfigError(
            f"{where}: fit does not know the memory of accelerator {pool.accelerator!r}; expected 'instance', or fit.device_gb"
        )
    return Budget(int(device_gb * GIB), int(host_gb * GIB) if host_gb is not None else None)


def _refused(job: JobConfig) -> tuple[str, ...]:
    if job.dp is not None and job.dp.unit == "example":
        return "offload", "activation_checkpointing", "low_precision"
    return ("offload",) if isinstance(job.inner.optimizer, MuonConfig) else ()
