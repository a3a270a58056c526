"""One live DeepSpeed engine on one rank: started once, kept for the whole job."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger as deepspeed_logger

from xcloud.training.models import quiet_transformers
from xcloud.training.settings import EngineConfig, InnerConfig

__all__ = ["build_engine", "device_of", "join_process_group", "optimizer_state_bytes"]


def device_of(on_gpu: bool) -> torch.device:
    """The device of this process: Ray leaves one GPU visible to each rank."""
    return torch.device("cuda", 0) if on_gpu else torch.device("cpu")


def join_process_group(address: str, port: int, rank: int, world: int, on_gpu: bool, threads: int) -> None:
    """Start torch.distributed for one pool: nccl on GPU, gloo on CPU."""
    if torch.distributed.is_initialized():
        assert torch.distributed.get_world_size() == world, "one process serves one pool"
        return
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(world),
    )
    deepspeed_logger.setLevel(logging.ERROR)
    quiet_transformers()
    if on_gpu:
        torch.cuda.set_device(0)
    else:
        torch.set_num_threads(threads)
        # DeepSpeed would compile a shared-memory op for up to two minutes; gloo serves without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if world == 1 and not on_gpu:  # nobody to meet, so no port that another process might take first
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # in its __all__ at run time only
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False
    )


def build_engine(model: torch.nn.Module, engine: EngineConfig, inner: InnerConfig, world: int) -> Any:
    """Wrap `model` (fp32, host) in a DeepSpeed engine with the job's inner optimizer.

    The learning rate is set by the caller at every step, so there is no scheduler inside.
    """
    if engine.activation_checkpointing:
        # Renamed in transformers 5.23; Python 3.10 has an older one.
        old = getattr(model, "gradient_checkpointing_enable", None)
        enable: Any = getattr(model, "activation_checkpointing_enable", old)
        enable(**{f"{enable.__name__.removesuffix('_enable')}_kwargs": {"use_reentrant": False}})
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": engine.micro_batch,
        "gradient_accumulation_steps": engine.gradient_accumulation,
        "train_batch_size": engine.micro_batch * engine.gradient_accumulation * world,
        "gradient_clipping": inner.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {"enabled": engine.precision == "fp16", "initial_scale_power": 12},
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    with _quiet_warnings():
        built, _, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=parameters,
            optimizer=inner.optimizer.build(parameters, model),
            config=settings,
        )
    return built


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of optimizer state on this rank."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )


@contextmanager
def _quiet_warnings() -> Iterator[None]:
    """DeepSpeed warns at start about client optimizers and missing launchers; both are meant."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
