"""Example-level DP-SGD (arXiv 1607.00133) inside a live DeepSpeed engine, under every ZeRO stage.

A step, seen from a rank:

1. Sample: every example of the region is in, independently, with the same probability (Poisson sampling). The ranks
   share the examples out by their ids, so that each draws for its own part. How many are in is random; ranks agree on a
   number of micro-batches, at least one, and fill up with rows that count nothing.
2. Measure: a forward pass through `engine.module` and the gradients of layer outputs give each example's gradient norm
   (`xcloud.training.ghost`). No weight gets a gradient here.
3. Sum: a pass through the engine, of the sum of c_i loss_i with c_i = min(1, C / norm_i). It must be two passes:
   the engine reduces and shards gradients as they appear.
4. Noise: before the torch optimizer steps its (sharded) masters, Gaussian noise goes onto their gradients.

Scale: DeepSpeed averages over the ranks, so losses are multiplied by ranks / expected batch, and the masters' gradient is
the clipped sum over the expected batch L. The expected one, since the real size of a sample is a secret.

Noise once: with ZeRO 1 to 3 each rank steps masters that no other rank steps, and adds noise of standard deviation
sigma C / L to just those, from a stream of its own. With ZeRO 0 every rank steps all of them, so all draw the same noise
from a stream with a shared key. Either way each weight gets it once, and no average makes it smaller.

Nothing else of the training data leaves the rank: losses and sample sizes are not reported.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from xcloud.errors import XCloudError
from xcloud.messages import PrivacyTerms
from xcloud.privacy import DPConfig
from xcloud.privacy.noise import KEY_BYTES, SecureRandom
from xcloud.training.ghost import GhostNorms
from xcloud.training.parameters import EngineParameters

__all__ = ["PrivateSteps", "agreed_terms"]

Indices = npt.NDArray[np.int64]


class PrivateSteps:
    """The inner steps of one rank, each a clipped and noisy sum over a Poisson sample.

    Args:
        engine: DeepSpeed engine in fp32, over a Hugging Face causal language model.
        parameters: of the engine.
        terms: probability and noise multiplier.
        clip_norm: L2 norm to which each example's gradient is clipped.
        examples: sequences that the region trains on, on all ranks.
        expected_batch: of them in one step's sample.
        length: of a sequence.
        micro_batch: sequences in one forward pass.
        replicated: every rank steps all masters (ZeRO 0).
        read: sequences by their ids, int64 [n, T] on the engine's device.

    Raises:
        ModelError: the model has a module that cannot be measured by example; names it.
    """

    def __init__(
        self,
        engine: Any,
        parameters: EngineParameters,
        terms: PrivacyTerms,
        clip_norm: float,
        *,
        examples: int,
        expected_batch: int,
        length: int,
        micro_batch: int,
        replicated: bool,
        read: Callable[[Indices], torch.Tensor],
    ) -> None:
        self.engine, self.parameters, self.terms, self.clip_norm = engine, parameters, terms, clip_norm
        self.length, self.micro_batch, self.read = length, micro_batch, read
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.expected_batch = expected_batch
        self.own = np.arange(self.rank, examples, self.world, dtype=np.int64)
        self.replicated = replicated
        self.ghost = GhostNorms(engine.module)
        # A model with learned positions looks them up once for all rows, unless it is told for each.
        takes = inspect.signature(engine.module.forward).parameters
        self.positions = self.ghost.embeddings > 1 and "position_ids" in takes
        self.secret = SecureRandom()
        self.noise = SecureRandom(_shared_key(engine.device) if replicated else None)
        self._noised: list[torch.Tensor] = []
        parameters.optimizer.register_step_pre_hook(self._add_noise)

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on the masters' gradient, which is a sum over the expected batch."""
        return self.terms.noise_multiplier * self.clip_norm / self.expected_batch

    def sample(self) -> Indices:
        """This rank's share of a fresh Poisson sample."""
        return self.own[self.secret.poisson_sample(len(self.own), self.terms.sampling_probability)]

    def step(self, picked: Indices | None = None) -> None:
        """One inner step; collective.

        Args:
            picked: this rank's examples; None: of a fresh sample, which alone makes the accounting true.

        Raises:
            XCloudError: the optimizer did not step masters with noise.
        """
        picked = self.sample() if picked is None else picked
        passes = self._agreed(-(-len(picked) // self.micro_batch))
        for number in range(passes):
            self.engine.set_gradient_accumulation_boundary(number == passes - 1)
            rows = picked[number * self.micro_batch : (number + 1) * self.micro_batch]
            self.engine.backward(self._clipped_loss(rows), scale_wrt_gas=False)
        self._noised = []
        self.engine.step()
        if not self._noised or not (
            self.replicated or len(self._noised) == len(list(self.parameters.flats()))
        ):
            raise XCloudError(
                "dp: DeepSpeed stepped without noise on every gradient; the model must not leave this region"
            )

    def _clipped_loss(self, rows: Indices) -> torch.Tensor:
        """The loss whose gradient is these examples' clipped sum, times ranks over expected batch."""
        real = len(rows)
        filler = torch.zeros(
            (self.micro_batch - real, self.length), dtype=torch.int64, device=self.engine.device
        )
        batch = torch.cat([self.read(rows), filler]) if real else filler
        seed = self.secret.seed()  # both passes must drop the same units, and nobody may foresee which
        torch.manual_seed(seed)
        with self.ghost.recording():
            losses = self._losses(self.engine.module, batch)
        factors = (self.clip_norm / self.ghost.norms(losses)).clamp(max=1.0)
        factors[real:] = 0.0
        del losses
        torch.manual_seed(seed)
        return (self._losses(self.engine, batch) * factors).sum() * (self.world / self.expected_batch)

    def _losses(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        """Mean token loss of each example: [B]."""
        extra = {}
        if self.positions:
            extra["position_ids"] = torch.arange(batch.shape[1], device=batch.device).expand(batch.shape)
        logits = model(input_ids=batch, **extra).logits
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none").mean(1)

    def _agreed(self, passes: int) -> int:
        """The most that any rank needs; one at least, for a step without examples releases noise all the same."""
        most = torch.tensor([max(1, passes)], device=self.engine.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def _add_noise(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if flat.grad is None:  # nothing is released of a weight that is not stepped
                    continue
                noise = torch.from_numpy(self.noise.normal(flat.grad.numel())).to(flat.grad.device)
                flat.grad.add_(noise.view(flat.grad.shape), alpha=self.deviation)
                self._noised.append(flat)


def agreed_terms(dp: DPConfig, region: str, examples: int, batch: int, steps: int) -> PrivacyTerms:
    """`DPConfig.terms`, calibrated by the first rank for all; collective."""
    found: list[PrivacyTerms | XCloudError | None] = [None]
    if dist.get_rank() == 0:
        try:
            found = [dp.terms(region, examples, batch, steps)]
        except XCloudError as error:
            found = [error]  # for all ranks, or the others would wait for ever
    dist.broadcast_object_list(found, 0)
    if isinstance(found[0], XCloudError):
        raise found[0]
    assert found[0] is not None
    return found[0]


def _shared_key(device: torch.device) -> bytes:
    """A key of the first rank's, known to all."""
    key = torch.frombuffer(bytearray(os.urandom(KEY_BYTES)), dtype=torch.uint8).to(device)
    dist.broadcast(key, 0)
    return bytes(key.cpu().numpy().tobytes())
