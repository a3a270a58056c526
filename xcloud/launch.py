"""Sets a run up and plays it: checkpoints, run folder, Ray, regions, aggregator."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

from xcloud.aggregation import AggregatorHandle, ClusterAggregation
from xcloud.billing import elsewhere, price_file, tariff
from xcloud.checkpoint import CheckpointStore
from xcloud.cloud.session import node_labels, ray_session
from xcloud.cluster_region import ClusterRegion
from xcloud.config import JobConfig
from xcloud.driver import Run
from xcloud.fitting import fit_pools
from xcloud.fleet import Fleet
from xcloud.ledger import Outcome, find_commit, keep_job
from xcloud.masking import MaskedAggregation
from xcloud.metrics import RunLog
from xcloud.secure.local import make_keys, open_driver
from xcloud.secure.settings import SecureConfig

__all__ = ["train"]


def train(
    job: JobConfig,
    *,
    run_dir: Path,
    log: RunLog,
    address: str | None = None,
    resume: bool = False,
    stop: threading.Event | None = None,
    stop_after: int | None = None,
    insecure: bool = False,
) -> Outcome:
    """Train a job on a Ray cluster, or on one started here.

    Raises:
        XCloudError: what went wrong, in one line; the last committed round stays.
    """
    billed = tariff(job)  # a budget without prices, or a wrong instance type, ends before anything starts
    store = CheckpointStore(job.checkpoint.url or (run_dir / "checkpoints").absolute())
    job, fitted = fit_pools(job, price_file(job))
    record = find_commit(job, store, run_dir, resume)
    keep_job(job, run_dir)
    given, job = job, with_keys(job, run_dir)
    log.rewind(record.round if record else 0)
    names = [region.name for region in job.regions]
    with ray_session(address, job.cpus, insecure) as session:
        log.event(
            "run_started",
            job=job.name,
            rounds=job.rounds,
            run_dir=str(run_dir),
            pid=os.getpid(),
            host=socket.gethostname(),
            regions=names,
            envelope=None if job.envelope is None else job.envelope.keys or "made",
            exposed=session.exposed,
            simulation=True,  # regions that share a Ray cluster are not isolated from one another
            resumed_round=record.round if record else None,
        )
        for (name, pool), found in fitted.items():
            log.event("pool_fitted", region=name, pool=pool, **found.settings(), reason=found.why)
        if billed is not None and not session.local and (place := elsewhere(billed.hub, node_labels())):
            log.event("hub_elsewhere", place=str(place), hub=str(billed.hub))
        aggregator = ClusterAggregation(job, enforce_labels=not session.local)
        merging: AggregatorHandle = aggregator
        if job.secure_aggregation is not None:
            merging = masked(job, aggregator, job.secure_aggregation)
            log.event(
                "secure_aggregation", **promise(job.secure_aggregation, len(names), made=job is not given)
            )

        def build(name: str) -> ClusterRegion:
            return ClusterRegion(
                job,
                name,
                enforce_labels=not session.local,
                checkpoint_url=store.url,
                reader=aggregator.reader,
            )

        fleet = Fleet(names, build, job.failure, log)
        try:
            return Run(job, fleet, merging, store, log, stop or threading.Event()).play(record, stop_after)
        except KeyboardInterrupt:
            log.event("run_stopped", round=max(store.rounds(), default=0), reason="interrupted at once")
            raise
        except BaseException as error:
            log.event("run_failed", reason=f"{type(error).__name__}: {error}")
            raise
        finally:
            fleet.close()


def with_keys(job: JobConfig, run_dir: Path) -> JobConfig:
    """The job with keys to mask updates with: its own, or some made for this run."""
    secure = job.secure_aggregation
    if secure is None or secure.keys is not None:
        return job
    folder = (run_dir / "keys").absolute()
    make_keys(folder, [region.name for region in job.regions])
    return job.model_copy(update={"secure_aggregation": secure.model_copy(update={"keys": str(folder)})})


def masked(job: JobConfig, aggregator: ClusterAggregation, secure: SecureConfig) -> MaskedAggregation:
    """Merges that open nothing but the sum."""
    identity, roster = open_driver(secure)
    return MaskedAggregation(job, aggregator, identity, roster, roster.hash.hex())


def promise(secure: SecureConfig, regions: int, made: bool) -> dict[str, Any]:
    """What holds of a masked run; `made`: whoever starts it holds all keys."""
    return {
        "scheme": secure.scheme,
        "minimum": secure.survivors,
        "threshold": secure.threshold(regions),
        "colluders": secure.colluders,
        "keys": secure.keys,
        "made": secure.keys if made else None,
    }
