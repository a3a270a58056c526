"""What a region tells its ranks and hears from them. Light to import: no torch, no DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from xcloud.codecs import CodecConfig
from xcloud.data import SourceConfig, TokenizerConfig
from xcloud.messages import RoundSum
from xcloud.outer import OuterConfig
from xcloud.parts import Bundle
from xcloud.policies import StreamingConfig
from xcloud.privacy import DPConfig
from xcloud.secure.envelope import Opening
from xcloud.secure.tags import Sealed
from xcloud.training.settings import EngineConfig, InnerConfig, ModelConfig

__all__ = ["Landed", "Offer", "Trained", "WorkerSpec"]


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a rank needs to start; built by its region from the job file."""

    region: str
    pool: int
    rank: int
    world: int
    on_gpu: bool
    threads: int
    seed: int
    rounds: int
    sequence_length: int
    chunk_size: int
    model: ModelConfig
    engine: EngineConfig
    inner: InnerConfig
    outer: OuterConfig
    codec: CodecConfig
    downlink: CodecConfig
    streaming: StreamingConfig
    dp: DPConfig | None
    job: str
    members: int
    tokenizer: TokenizerConfig
    data: tuple[SourceConfig, ...]
    evaluate_on: tuple[SourceConfig, ...] | None
    held_out_fraction: float
    cache_dir: str
    eval_sequences: int
    guarded: bool
    hashed: bool
    halts: bool
    """Whether a round may end early, because the pool's machines may be taken away."""
    cohort: tuple[int, int]
    """Fewest regions whose masked sum is opened, and those of them that may tell what they have added."""


@dataclass(frozen=True)
class Offer:
    """One rank's encoded chunks, and the squared norm of its part of the update.

    `sealed` is what is signed of each chunk, where they are masked; `rows` what stands of each in the table of the
    envelope, where there is one.
    """

    bundle: Bundle
    norm_squared: float
    seconds: float
    sealed: tuple[Sealed, ...] = ()
    rows: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Beside:
    """One of the sums whose median is taken up; fields as in `RankWorker.apply`."""

    total: RoundSum
    merged: Bundle
    hashes: tuple[bytes, ...]
    openings: tuple[Opening, ...]


@dataclass(frozen=True)
class Trained:
    """What one rank did in a round."""

    loss_sum: float
    steps: int
    tokens: int
    seconds: float
    done: int = 0
    """Inner steps."""
    landing_s: float = 0.0
    """Seconds that the inner steps waited for an earlier round's merged update and for its outer step."""


@dataclass(frozen=True)
class Landed:
    """One rank has taken up a merged update: digests of its anchor chunks, and its share of an evaluation.

    `norm_squared` is of its chunks of the merged update, where somebody asks for it.
    """

    digests: dict[int, str]
    eval_loss_sum: float
    eval_tokens: int
    eval_s: float
    norm_squared: float = 0.0
