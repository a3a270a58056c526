"""A bare DeepSpeed loop, as a user would write it by hand: what the trainer's tokens per second are held against.

`deepspeed.initialize` with a torch AdamW over a Hugging Face Llama, batches cut from one array of tokens, and the
three calls of DeepSpeed's own tutorial for each step. No xcloud in it, on purpose. World size 1: it needs no launcher
and no port. `BareLoop` lives in this process, `BareProcess` in one of its own; both train some steps at a time, so that
a benchmark alternates them with the trainer while the machine drifts.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BareError", "BareLoop", "BareProcess", "BareSettings", "Timed", "bare_tokens_per_s"]

Tokens = npt.NDArray[np.int64]


class BareError(RuntimeError):
    """The process of the bare loop failed; the message holds its traceback."""


@dataclass(frozen=True)
class BareSettings:
    """What the loop trains and how.

    Attributes:
        model: keyword arguments of `transformers.LlamaConfig`.
        sequence: tokens in a sequence.
        micro_batch: sequences in a forward pass.
        gradient_accumulation: forward passes in an optimizer step.
        zero_stage: ZeRO stage, 0 to 3.
        lr, weight_decay: of AdamW.
        clip_norm: global gradient norm; 0 does not clip.
        threads: of torch; None leaves torch's own choice.
        seed: of the weights and of the order of the batches.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    sequence: int = 256
    micro_batch: int = 8
    gradient_accumulation: int = 1
    zero_stage: int = 1
    lr: float = 3e-4
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    threads: int | None = None
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step trains on."""
        return self.sequence * self.micro_batch * self.gradient_accumulation


@dataclass(frozen=True)
class Timed:
    """Some steps, timed: how many tokens in how many wall seconds, and the loss of the last forward pass."""

    tokens: int
    seconds: float
    loss: float

    @property
    def tokens_per_s(self) -> float:
        """Throughput of these steps."""
        return self.tokens / self.seconds


class BareLoop:
    """The loop in this process; starts torch.distributed (gloo, world size 1) if nobody has.

    Args:
        settings: what to train.
        tokens: one-dimensional, any integer type: an array in memory or a `numpy.memmap`.
    """

    def __init__(self, settings: BareSettings, tokens: npt.NDArray[Any]) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", "0")  # the engine asks for it, launcher or not
        # Here, because DS_ACCELERATOR is read at import, and who only holds a BareProcess need not wait for them.
        import deepspeed  # noqa: PLC0415
        import torch  # noqa: PLC0415
        import transformers  # noqa: PLC0415

        if len(tokens) <= settings.sequence:
            raise ValueError(f"expected more than {settings.sequence} tokens, found {len(tokens)}")
        self.settings = settings
        self.tokens = tokens
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # in its __all__ at run time only
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        if not deepspeed.comm.is_initialized():
            # Else it compiles an op for inference that training never calls, for up to two minutes.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        torch.manual_seed(settings.seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings.model, use_cache=False))
        groups = [  # the usual recipe, and the job's: matrices decay, vectors do not
            {
                "params": [p for p in model.parameters() if p.dim() >= 2],
                "weight_decay": settings.weight_decay,
            },
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.99))
        self.engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": settings.micro_batch,
                "gradient_accumulation_steps": settings.gradient_accumulation,
                "gradient_clipping": settings.clip_norm,
                "zero_optimization": {"stage": settings.zero_stage},
            },
        )
        self._from_numpy = torch.from_numpy
        self._generator = np.random.default_rng(settings.seed)

    def steps(self, count: int) -> Timed:
        """Train `count` optimizer steps."""
        assert count >= 1
        engine = self.engine
        started = time.perf_counter()
        for _ in range(count * self.settings.gradient_accumulation):
            x = self._from_numpy(self._batch())
            loss = engine(input_ids=x, labels=x).loss
            engine.backward(loss)
            engine.step()
        last = float(loss.item())
        return Timed(count * self.settings.tokens_per_step, time.perf_counter() - started, last)

    def _batch(self) -> Tokens:
        length = self.settings.sequence
        starts = self._generator.integers(0, len(self.tokens) - length, self.settings.micro_batch)
        batch = np.stack([self.tokens[start : start + length] for start in starts])
        return batch.astype(np.int64, copy=False)


class BareProcess:
    """A `BareLoop` in a process of its own, idle between two calls of `steps`; a context manager.

    The tokens are sent over once, at the start.

    Raises:
        BareError: the loop failed, at the start or in `steps`.
    """

    def __init__(self, settings: BareSettings, tokens: npt.NDArray[Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, settings, np.asarray(tokens))
        self._process = context.Process(target=_serve, args=arguments, name="bare deepspeed", daemon=True)
        self._process.start()
        theirs.close()
        self._receive()  # it stands

    def __enter__(self) -> BareProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def steps(self, count: int) -> Timed:
        """Train `count` optimizer steps there; the time is taken there too."""
        self._pipe.send(count)
        timed = self._receive()
        assert isinstance(timed, Timed)
        return timed

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(None)
        self._process.join(timeout=10)
        self._process.terminate()
        self._pipe.close()

    def _receive(self) -> Timed | None:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise BareError(f"the process ended with status {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise BareError(answer)
        assert answer is None or isinstance(answer, Timed)
        return answer


def _serve(pipe: Any, settings: BareSettings, tokens: npt.NDArray[Any]) -> None:
    try:
        loop = BareLoop(settings, tokens)
        pipe.send(None)
        while (count := pipe.recv()) is not None:
            pipe.send(loop.steps(count))
    except EOFError:
        return  # the benchmark ended without saying so
    except Exception:  # noqa: BLE001  # whatever it is, the benchmark must hear of it
        pipe.send(traceback.format_exc())


def bare_tokens_per_s(
    settings: BareSettings, tokens: npt.NDArray[Any], steps: int = 20, warmup: int = 3
) -> float:
    """Throughput of the bare loop alone, in a process of its own, after `warmup` steps."""
    with BareProcess(settings, tokens) as bare:
        bare.steps(warmup)
        return bare.steps(steps).tokens_per_s
