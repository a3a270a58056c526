"""The job file: one typed YAML, checked as a whole before anything starts.

`load_job` reads it, applies dotted overrides and raises one `ConfigError` that lists every
problem with its key's path, what was expected and the nearest known name.
"""

from __future__ import annotations

import importlib
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from xcloud.aggregators import AGGREGATORS, AggregatorConfig, MeanConfig
from xcloud.balance import BalanceConfig
from xcloud.cloud.settings import PlacementConfig
from xcloud.codecs import (
    CODECS,
    BFloat16Config,
    Codec,
    CodecConfig,
    Frame,
    GridConfig,
    IdentityConfig,
    SparseConfig,
    ring_of,
)
from xcloud.cost.fit import FitConfig
from xcloud.cost.settings import CostConfig
from xcloud.data import SOURCES, TOKENIZERS, BytesTokenizerConfig, SourceConfig, TokenizerConfig
from xcloud.errors import ConfigError
from xcloud.outer import OUTER_OPTIMIZERS, NesterovConfig, OuterConfig
from xcloud.policies import BufferConfig, FailureConfig, GuardConfig, StreamingConfig
from xcloud.privacy import DPConfig
from xcloud.registry import PartConfig, Registry, nearest
from xcloud.secure.ckks import EncryptedConfig
from xcloud.secure.member import minimum_survivors
from xcloud.secure.post import EnvelopeConfig, is_reserved
from xcloud.secure.primitives import digest
from xcloud.secure.settings import LEAST_GROUPS, LEAST_IN_GROUP, SecureConfig
from xcloud.strict_yaml import StrictDumper, StrictLoader
from xcloud.training.settings import (
    CORRECTIONS,
    INNER_OPTIMIZERS,
    SCHEDULES,
    EngineConfig,
    InnerConfig,
    ModelConfig,
    MuonConfig,
    ScaffoldConfig,
)
from xcloud.update import adds_up

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "HierarchyConfig",
    "JobConfig",
    "PoolConfig",
    "RegionConfig",
    "dump_job",
    "load_job",
    "parse_job",
]

FAMILIES: tuple[Registry[Any], ...] = (
    AGGREGATORS,
    CODECS,
    OUTER_OPTIMIZERS,
    SOURCES,
    TOKENIZERS,
    INNER_OPTIMIZERS,
    SCHEDULES,
    CORRECTIONS,
)

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PoolConfig(EngineConfig, PlacementConfig):
    """One homogeneous pool: one accelerator type, one ZeRO group, one placement group.

    Attributes:
        fit: have engine settings that are not stated here chosen from the memory of the machines; null: they have their defaults.
    """

    fit: Annotated[FitConfig | None, BeforeValidator(lambda value: {} if value == "auto" else value)] = None

    @property
    def sequences_per_step(self) -> int:
        return self.workers * self.micro_batch * self.gradient_accumulation


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


Sources = Annotated[
    tuple[Annotated[SerializeAsAny[SourceConfig], BeforeValidator(SOURCES.parse)], ...],
    BeforeValidator(_as_list),
    Field(min_length=1),
]


class RegionConfig(_Section):
    """One cloud region: its pools and the data that stays in it.

    Attributes:
        name: unique in the job.
        cloud: the provider it stands for (`aws`, `gcp`, `azure`, `on_prem`, ...).
        location: the cloud's own name of the place, by which prices are looked up; null: the region's name.
        data: one source or a list; read only by this region's own processes.
        evaluate_on: sources whose held-out split this region evaluates on; default: its own.
        pools: at least one.
    """

    name: Annotated[str, Field(pattern=NAME)]
    cloud: Annotated[str, Field(min_length=1)]
    location: Annotated[str, Field(min_length=1)] | None = None
    data: Sources
    evaluate_on: Sources | None = None
    pools: Annotated[tuple[PoolConfig, ...], Field(min_length=1)]

    @property
    def sequences_per_step(self) -> int:
        return sum(pool.sequences_per_step for pool in self.pools)

    @property
    def on_spot(self) -> bool:
        """Whether some of its machines may be taken away."""
        return any(pool.market == "spot" for pool in self.pools)


class DataConfig(_Section):
    """How every region prepares its data.

    Attributes:
        held_out_fraction: share of documents kept for evaluation and never trained on.
        cache_dir: where packed token files live, on each node; default: the user's cache folder.
    """

    held_out_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    cache_dir: str | None = None


class EvaluationConfig(_Section):
    """Evaluation of the committed global model on held-out text.

    Attributes:
        sequences: held-out sequences per region and evaluation; 0 switches evaluation off.
        every: rounds between evaluations; the last round is always evaluated.
    """

    sequences: Annotated[int, Field(ge=0)] = 64
    every: Annotated[int, Field(ge=1)] = 1


class CheckpointConfig(_Section):
    """Checkpoints of committed rounds.

    Attributes:
        url: folder or fsspec URL that every region and the driver can reach; default: the run folder.
        every: rounds between checkpoints; 0 keeps only the one at the end of the run.
        keep: committed checkpoints kept; older ones are deleted.
    """

    url: str | None = None
    every: Annotated[int, Field(ge=0)] = 1
    keep: Annotated[int, Field(ge=1)] = 2


class HierarchyConfig(_Section):
    """Where updates meet on their way into the sum.

    Attributes:
        type: `flat`: all at the aggregator. `cloud`: regions of one cloud first, by an aggregator in it.
        codec: of a cloud's mean on its way to the aggregator; null: bf16. Encodings that add need none.
    """

    type: Literal["flat", "cloud"] = "flat"
    codec: Annotated[
        SerializeAsAny[CodecConfig] | None,
        BeforeValidator(lambda value: None if value is None else CODECS.parse(value)),
    ] = None

    def relay(self) -> Codec:
        """The codec between a cloud's aggregator and the root."""
        return (self.codec or BFloat16Config()).build()


class JobConfig(_Section):
    """A whole job. See `docs/job-file.md` for every key."""

    name: Annotated[str, Field(pattern=NAME)]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    rounds: Annotated[int, Field(ge=1)]
    sequence_length: Annotated[int, Field(ge=2)] = 256
    model: ModelConfig
    tokenizer: Annotated[SerializeAsAny[TokenizerConfig], BeforeValidator(TOKENIZERS.parse)] = (
        BytesTokenizerConfig()
    )
    regions: Annotated[tuple[RegionConfig, ...], Field(min_length=1)]
    inner: InnerConfig = InnerConfig()
    aggregator: Annotated[SerializeAsAny[AggregatorConfig], BeforeValidator(AGGREGATORS.parse)] = MeanConfig()
    aggregation_actors: Annotated[int, Field(ge=1)] = 1
    hierarchy: Annotated[
        HierarchyConfig, BeforeValidator(lambda value: {"type": value} if isinstance(value, str) else value)
    ] = HierarchyConfig()
    outer: Annotated[SerializeAsAny[OuterConfig], BeforeValidator(OUTER_OPTIMIZERS.parse)] = NesterovConfig()
    codec: Annotated[SerializeAsAny[CodecConfig], BeforeValidator(CODECS.parse)] = IdentityConfig()
    downlink: Annotated[SerializeAsAny[CodecConfig], BeforeValidator(CODECS.parse)] = IdentityConfig()
    chunk_size: Annotated[int, Field(ge=1024, le=1 << 24)] = 1 << 20
    balance: Annotated[
        BalanceConfig,
        BeforeValidator(
            lambda value: {"pools": value, "regions": value} if isinstance(value, str) else value
        ),
    ] = BalanceConfig()
    streaming: StreamingConfig = StreamingConfig()
    buffer: BufferConfig | None = None
    dp: DPConfig | None = None
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    failure: FailureConfig = FailureConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cost: CostConfig | None = None
    envelope: EnvelopeConfig | None = EnvelopeConfig()
    secure_aggregation: SecureConfig | None = None
    guards: GuardConfig | None = None
    plugins: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> JobConfig:
        names = [region.name for region in self.regions]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"regions: the name {twice[0]!r} is used twice; names must be unique")
        odd = next(
            (r.cloud for r in self.regions if not re.fullmatch(NAME, f"aggregator-of-{r.cloud}")), None
        )
        if odd is not None and self.hierarchy.type == "cloud" and self.envelope is not None:
            raise ValueError(
                f"regions: the cloud {odd!r} has an aggregator that is named after it; expected letters, digits, '_', '.' and "
                "'-', at most 49 of them"
            )
        taken = next((name for name in names if is_reserved(name)), None)
        if taken is not None:
            raise ValueError(
                f"regions: {taken!r} is the name of the driver or of an aggregation actor; expected another one"
            )
        quorum = self.failure.quorum
        if quorum is not None and quorum > len(self.regions):
            raise ValueError(
                f"failure.quorum is {quorum}, but 'regions' lists only {len(self.regions)}; "
                "expected at most that many"
            )
        self._check_scheme()
        codec = self.coding.build()
        if adds_up(codec):
            if not isinstance(self.aggregator, MeanConfig):
                raise ValueError(
                    f"codec {self.codec.type!r} is added up and never opened one by one, which aggregator "
                    f"{self.aggregator.type!r} needs; expected aggregator mean, or a codec such as block or topk"
                )
            if not isinstance(self.downlink, IdentityConfig):
                raise ValueError(
                    f"downlink {self.downlink.type!r} has nothing to do: the total of codec "
                    f"{self.codec.type!r} goes down as it is; leave 'downlink' out"
                )
        if adds_up(self.downlink.build()):
            raise ValueError(
                f"downlink {self.downlink.type!r} takes its scale from what came before, which the aggregator "
                "does not keep; expected identity, bf16, block, e3m0 or sparse"
            )
        self._check_timing(codec)
        self._check_hierarchy(codec)
        self._check_masks(codec)
        self._check_guards()
        self._check_privacy()
        self._check_balance()
        if self.inner.correction is not None and self.streaming.keeps_local:
            raise ValueError(
                f"inner.correction {self.inner.correction.type!r} corrects the drift from a common model, but with "
                "streaming a region goes on from its own; leave one of them out"
            )
        if isinstance(self.inner.correction, ScaffoldConfig) and self.buffer is not None:
            raise ValueError(
                "inner.correction scaffold needs updates of one round, while buffer merges those of several; "
                "leave one of them out"
            )
        if isinstance(self.inner.correction, ScaffoldConfig) and not isinstance(self.aggregator, MeanConfig):
            raise ValueError(
                "inner.correction scaffold takes the merged update for the mean gradient of the regions; "
                f"aggregator is {self.aggregator.type!r}, expected mean"
            )
        for r, region in enumerate(self.regions):
            for p, pool in enumerate(region.pools):
                if pool.precision == "fp16" and not pool.on_gpu:
                    raise ValueError(
                        f"regions[{r}].pools[{p}]: precision fp16 needs a gpu accelerator; "
                        "expected fp32 or bf16 on cpu"
                    )
                if pool.offload != "none" and isinstance(self.inner.optimizer, MuonConfig):
                    raise ValueError(
                        f"regions[{r}].pools[{p}]: offload {pool.offload} keeps the masters in host memory, while muon multiplies whole "
                        "matrices of them; expected offload: none, or another inner.optimizer"
                    )
        positions = (self.model.config or {}).get("max_position_embeddings")
        if isinstance(positions, int) and positions < self.sequence_length:
            raise ValueError(
                f"sequence_length is {self.sequence_length}, but model.config.max_position_embeddings "
                f"allows only {positions}"
            )
        return self

    def _check_timing(self, codec: Codec) -> None:
        """What `streaming` and `buffer` cannot be combined with."""
        overlap, steps = self.streaming.overlap, self.inner.steps
        if overlap and overlap >= steps:
            raise ValueError(
                f"streaming.overlap is {overlap}, but a round has inner.steps: {steps}; "
                "expected less, since a merged update is taken up before the round ends"
            )
        if self.buffer is None:
            return
        if self.buffer.goal > len(self.regions):
            raise ValueError(
                f"buffer.goal is {self.buffer.goal}, but 'regions' lists only {len(self.regions)}; "
                "expected at most that many"
            )
        if self.failure.quorum is not None:
            raise ValueError(
                "failure.quorum and buffer.goal both say how many regions a merge waits for; leave failure.quorum out"
            )
        if self.streaming.keeps_local:
            raise ValueError(
                "buffer and streaming cannot be combined: regions of a buffered run start from different models; "
                "leave one of them out"
            )
        if adds_up(codec):
            raise ValueError(
                f"codec {self.codec.type!r} adds encodings of one round only, while buffer merges updates of "
                "different rounds; expected a codec that is opened, such as bf16, block or topk"
            )

    def _check_balance(self) -> None:
        """What steps that follow measured speed cannot be combined with."""
        for level in ("pools", "regions"):
            mode = getattr(self.balance, level)
            if mode == "fixed":
                continue
            what = f"balance.{level} {mode} gives {level} different numbers of steps"
            if self.inner.steps == 0:
                raise ValueError(f"{what}, but inner.steps is 0; expected 1 or more")
            if isinstance(self.inner.correction, ScaffoldConfig):
                raise ValueError(
                    f"{what}, while inner.correction scaffold takes them as equal; leave one of them out"
                )
            if self.dp is not None and self.dp.unit == "example":
                raise ValueError(
                    f"{what}, while dp has accounted for inner.steps in each; expected balance fixed"
                )
        if self.balance.regions == "fixed":
            return
        if self.buffer is not None:
            raise ValueError(
                "balance.regions has regions finish together, while with buffer nobody waits; leave one of them out"
            )
        if self.secure_aggregation is not None:
            raise ValueError(
                "balance.regions lets the driver say how much each region trains; if it has all but one do next to nothing, a "
                "masked sum is that one's update; expected balance: {pools: dynamic}, or no secure_aggregation"
            )

    def _check_guards(self) -> None:
        """What taking a merged update back needs."""
        if self.guards is None:
            return
        if self.checkpoint.every != 1:
            raise ValueError(
                f"guards take a round back by loading the commit before it, but checkpoint.every is {self.checkpoint.every}; expected 1"
            )
        if self.streaming.keeps_local or self.buffer is not None:
            other = "buffer" if self.buffer is not None else "streaming"
            raise ValueError(
                f"guards take back what no region has built on yet, while with {other} regions go on before they know; leave one of them out"
            )
        if self.guards.loss is not None and (self.evaluation.sequences == 0 or self.evaluation.every != 1):
            raise ValueError(
                "guards.loss looks at the held-out loss of every round; expected evaluation.sequences above 0 and evaluation.every 1"
            )

    def _check_groups(self, secure: SecureConfig) -> None:
        """What a median over groups needs."""
        if secure.groups == 1:
            return
        if secure.groups < LEAST_GROUPS:
            raise ValueError(
                f"secure_aggregation.groups is {secure.groups}, whose median is their mean; expected 1, or "
                f"{LEAST_GROUPS} or more"
            )
        smallest, least = len(self.regions) // secure.groups, max(LEAST_IN_GROUP, secure.survivors)
        if smallest < least:
            raise ValueError(
                f"secure_aggregation.groups is {secure.groups}: of {len(self.regions)} 'regions' a group would hold "
                f"{smallest}; expected at least {least} in each, so fewer groups or more regions"
            )
        if self.streaming.overlap:
            raise ValueError(
                "secure_aggregation.groups takes a median of several sums, which streaming.overlap does not deliver; "
                "leave one of them out"
            )

    @property
    def coding(self) -> CodecConfig:
        """The codec that updates are added or opened by: `codec`, unless they are encrypted homomorphically."""
        secure = self.secure_aggregation
        return EncryptedConfig() if secure is not None and secure.scheme == "ckks" else self.codec

    def _check_scheme(self) -> None:
        """What homomorphic encryption cannot be combined with, beyond what no secure aggregation can."""
        if self.coding is self.codec:
            return
        scheme = "secure_aggregation.scheme is ckks, which adds fp32 values"
        for key, found in (("codec", self.codec), ("downlink", self.downlink)):
            if not isinstance(found, IdentityConfig):
                raise ValueError(
                    f"{scheme}, but {key} is {found.type!r}; expected {key} identity, or scheme masks"
                )
        if not isinstance(self.aggregator, MeanConfig):
            raise ValueError(
                f"{scheme} and opens none of them, but aggregator is {self.aggregator.type!r}; expected aggregator mean"
            )
        if self.buffer is not None:
            raise ValueError(
                f"{scheme} of one round under one key, but buffer merges those of several; leave one of them out"
            )

    def _check_masks(self, codec: Codec) -> None:
        """What secure aggregation cannot be combined with."""
        secure = self.secure_aggregation
        if secure is None:
            return
        if ring_of(codec, 1, Frame(members=len(self.regions))) is None:
            raise ValueError(
                f"secure_aggregation adds integers under masks, and codec {self.codec.type!r} sends none that add; "
                "expected codec fixed, grid, or random_k with 'bits'"
            )
        if self.hierarchy.type != "flat":
            raise ValueError(
                f"secure_aggregation opens the sum of all regions only, while hierarchy {self.hierarchy.type!r} merges "
                "those of a cloud first; expected hierarchy flat"
            )
        if secure.minimum is not None and secure.minimum < 3 and not secure.allow_two:
            raise ValueError(
                "secure_aggregation.minimum is 2, with which each region learns the other's update from the sum; "
                "expected at least 3, or allow_two: true if that is meant"
            )
        least = minimum_survivors(secure.colluders, secure.allow_two)
        if secure.survivors < least:
            raise ValueError(
                f"secure_aggregation.minimum is {secure.minimum}, and colluders {secure.colluders}: what {secure.colluders} of "
                f"{secure.minimum} know can leave one region's update; expected at least {least}"
            )
        if secure.survivors > len(self.regions):
            raise ValueError(
                f"secure_aggregation needs {secure.survivors} regions in a sum, but 'regions' lists only "
                f"{len(self.regions)}; expected at least that many (with two, allow_two: true)"
            )
        self._check_groups(secure)
        if self.failure.quorum is not None and self.failure.quorum < secure.survivors:
            raise ValueError(
                f"failure.quorum is {self.failure.quorum}, but secure_aggregation opens no sum of fewer than "
                f"{secure.survivors} regions; expected at least that many"
            )
        if secure.threshold(len(self.regions)) > len(self.regions):
            raise ValueError(
                f"secure_aggregation.colluders is {secure.colluders} of {len(self.regions)} regions; "
                "expected fewer than all of them"
            )

    @property
    def ring_bits(self) -> int:
        """Bits of the integers that are added under masks."""
        ring = ring_of(self.coding.build(), 1, Frame(members=len(self.regions)))
        assert ring is not None, "asked of masked jobs only"
        return ring.width

    @property
    def update_digest(self) -> str:
        """What makes an update the integers that it is: equal in all regions that are added."""
        return digest(
            "xcloud/update/v2",
            self.coding.model_dump_json(),
            len(self.regions),
            self.chunk_size,
            self.seed,
            self.aggregator.model_dump_json(),
            self.secure_aggregation.groups if self.secure_aggregation is not None else 1,
            self.dp.model_dump_json() if self.dp is not None else "",
        ).hex()

    @property
    def cohort(self) -> tuple[int, int]:
        """Fewest regions whose masked sum is opened, and colluders among them; all, and none, without masks."""
        secure = self.secure_aggregation
        return (secure.survivors, secure.colluders) if secure is not None else (len(self.regions), 0)

    @property
    def needed(self) -> int:
        """Regions that a round cannot do without."""
        return self.buffer.goal if self.buffer else self.failure.quorum or len(self.regions)

    def _check_privacy(self) -> None:
        """What `dp` cannot be combined with."""
        grid = isinstance(self.codec, GridConfig)
        if grid and (self.dp is None or not self.dp.distributed):
            raise ValueError(
                "codec grid takes its step and its noise from dp; expected dp with unit: region and mechanism: skellam, "
                "or another codec"
            )
        if self.dp is None:
            return
        if self.dp.unit == "region":
            self._check_region_privacy(self.dp)
            return
        if self.inner.clip_norm is not None:
            raise ValueError(
                f"dp.clip_norm bounds each example's gradient, and inner.clip_norm: {self.inner.clip_norm:g} would "
                "scale the noisy sum again; expected inner.clip_norm: null"
            )
        by = getattr(self.aggregator, "by", "loss")
        if self.aggregator.type == "loss_over_size" or (self.aggregator.type == "dynamic" and by == "loss"):
            raise ValueError(
                f"dp keeps training losses inside the regions, but aggregator {self.aggregator.type!r} weighs by "
                "them; expected mean, or another that does without"
            )
        for r, region in enumerate(self.regions):
            if len(region.pools) > 1:
                raise ValueError(
                    f"regions[{r}].pools: dp samples a region's examples for one pool; expected one, "
                    f"found {len(region.pools)}"
                )
            for p, pool in enumerate(region.pools):
                if pool.precision != "fp32":
                    raise ValueError(
                        f"regions[{r}].pools[{p}].precision {pool.precision} rounds gradients after dp has measured "
                        "their norms (and fp16 scales the loss), so dp.clip_norm would not hold; expected fp32"
                    )
                if pool.offload != "none":
                    raise ValueError(
                        f"regions[{r}].pools[{p}].offload {pool.offload} moves the gradients that dp adds its noise to; expected none"
                    )
                if pool.activation_checkpointing:
                    raise ValueError(
                        f"regions[{r}].pools[{p}].activation_checkpointing drops the activations from which dp takes "
                        "each example's gradient norm; expected false"
                    )

    def _check_region_privacy(self, dp: DPConfig) -> None:
        """What `dp.unit: region` cannot be combined with."""
        if not isinstance(self.aggregator, MeanConfig) or self.aggregator.weigh_by != "equal":
            raise ValueError(
                f"dp.unit region bounds what each region changes by a fixed share, but aggregator {self.aggregator.type!r} "
                "weighs otherwise; expected aggregator: {type: mean, weigh_by: equal}"
            )
        if self.hierarchy.type != "flat":
            raise ValueError(
                f"dp.unit region clips and noises updates where all meet, while hierarchy {self.hierarchy.type!r} merges "
                "those of a cloud first; expected hierarchy flat"
            )
        if self.buffer is not None or self.streaming.overlap:
            other = "buffer" if self.buffer is not None else "streaming.overlap"
            raise ValueError(
                f"dp.unit region books a merge before its round begins, while {other} merges when other rounds have begun; "
                "leave one of them out"
            )
        if self.guards is not None:
            raise ValueError(
                "guards look at losses and norms of a merge, which dp.unit region does not let out; leave one of them out"
            )
        open_text = [region.name for region in self.regions if region.evaluate_on is None]
        if self.evaluation.sequences and open_text:
            raise ValueError(
                f"dp.unit region hides all of a region's text, but evaluation would tell the loss on that of {open_text[0]!r}; "
                "expected evaluation.sequences: 0, or evaluate_on with public text in each region"
            )
        if dp.central:
            if isinstance(self.codec, SparseConfig):
                raise ValueError(
                    "dp.mechanism gaussian adds noise to what arrives, but codec sparse sends more bytes for some updates than for "
                    "others, and their number is told; expected a codec of fixed length, such as bf16, block or topk"
                )
            if self.secure_aggregation is not None:
                raise ValueError(
                    "dp.mechanism gaussian has the aggregation actor clip each update, which secure_aggregation hides from "
                    "it; expected dp.mechanism: skellam, or no secure_aggregation"
                )
            if adds_up(self.codec.build()):
                raise ValueError(
                    f"dp.mechanism gaussian clips each update, but codec {self.codec.type!r} is added up and never opened one "
                    "by one; expected a codec that is opened, such as identity, bf16 or block"
                )
            return
        if self.secure_aggregation is None:
            raise ValueError(
                "dp.mechanism skellam hides a region in a masked sum; expected secure_aggregation, or dp.mechanism: gaussian"
            )
        if not isinstance(self.codec, GridConfig):
            raise ValueError(
                f"dp.mechanism skellam adds its noise to integers on a public grid, but codec is {self.codec.type!r}; "
                "expected codec grid"
            )
        if self.secure_aggregation.groups > 1:
            raise ValueError(
                "dp.mechanism skellam accounts for one sum in a round, while secure_aggregation.groups opens several; "
                "leave one of them out"
            )

    def _check_hierarchy(self, codec: Codec) -> None:
        """Refuse what cannot be merged in two steps."""
        if self.hierarchy.type == "flat":
            if self.hierarchy.codec is not None:
                raise ValueError(
                    "hierarchy.codec has nothing to do with type 'flat'; expected type 'cloud', or no codec"
                )
            return
        aggregator = self.aggregator.build()
        if aggregator.needs_gram or not aggregator.additive:
            raise ValueError(
                f"hierarchy 'cloud' merges the regions of a cloud first, but aggregator {self.aggregator.type!r} "
                "must see all updates side by side; expected mean, dynamic, fednova or loss_over_size, "
                "or hierarchy flat"
            )
        if self.hierarchy.codec is not None and adds_up(codec):
            raise ValueError(
                f"hierarchy.codec {self.hierarchy.codec.type!r} has nothing to do: encodings of codec "
                f"{self.codec.type!r} are added unopened inside a cloud too; leave it out"
            )
        if self.hierarchy.codec is not None and adds_up(self.hierarchy.relay()):
            raise ValueError(
                f"hierarchy.codec {self.hierarchy.codec.type!r} takes its scale from what "
                "came before, which an aggregator does not keep; expected identity, bf16, block, e3m0 or sparse"
            )

    @property
    def cpus(self) -> int:
        """CPU cores that all pools together reserve."""
        return sum(pool.workers * pool.cpus for region in self.regions for pool in region.pools)

    def region(self, name: str) -> RegionConfig:
        """The region called `name`."""
        return next(region for region in self.regions if region.name == name)


def load_job(path: str | Path, overrides: Iterable[str] = ()) -> JobConfig:
    """Read a job file and apply `path=value` overrides.

    Args:
        path: the YAML file.
        overrides: dotted paths with YAML values, for example `inner.steps=50`,
            `regions.0.pools.0.workers=2` or `regions.us-east-1.pools.0.micro_batch=4`.

    Raises:
        ConfigError: names the file, each wrong key's path, what was expected and the nearest known name.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such job file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return parse_job(text, overrides, origin=str(path))


def parse_job(text: str, overrides: Iterable[str] = (), origin: str = "job") -> JobConfig:
    """Like `load_job`, from YAML text; `origin` names it in errors."""
    try:
        raw = yaml.load(text, Loader=StrictLoader)  # noqa: S506 - a SafeLoader subclass  # nosec B506
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{origin}: expected a mapping of job keys, got {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    plugins = raw.get("plugins")
    for plugin in plugins if isinstance(plugins, list) else []:
        _import_plugin(plugin, origin)
    try:
        job = JobConfig.model_validate(raw)
        lines = list(_switches(raw, job.model_dump(mode="json")))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        lines = [_explain(e, raw) for e in errors if not _only_follows(e, errors)]
    if lines:
        raise ConfigError(f"{origin}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0]))
    return job


def dump_job(job: JobConfig) -> str:
    """The job as YAML; `parse_job` gives the same job back."""
    return yaml.dump(job.model_dump(mode="json"), Dumper=StrictDumper, sort_keys=False, allow_unicode=True)


def _import_plugin(plugin: Any, origin: str) -> None:
    try:
        importlib.import_module(str(plugin))
    except Exception as error:
        raise ConfigError(f"{origin}: plugins: cannot import {plugin!r}: {error}") from error


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply one `path=value` override in place."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override!r}: expected path=value, for example inner.steps=50")
    try:
        value = yaml.load(text, Loader=StrictLoader)  # noqa: S506 - a SafeLoader subclass  # nosec B506
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from None
    node: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in node]
            if key.isdecimal() and int(key) < len(node):
                index = int(key)
            elif key in names:
                index = names.index(key)
            else:
                known = ", ".join([str(n) for n in names if n] or [f"0..{len(node) - 1}"])
                at = ".".join(keys[:depth])
                raise ConfigError(f"--set {override!r}: {at} has no entry {key!r}; expected one of {known}")
            if last:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            elif node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            at = ".".join(keys[:depth])
            if depth and isinstance(node, str):
                raise ConfigError(
                    f"--set {override!r}: {at} is the name {node!r}; give a mapping with 'type:'"
                )
            raise ConfigError(f"--set {override!r}: {at} is a single value and has no key {key!r}")


def _path(location: Sequence[Any]) -> str:
    out = ""
    for part in location:
        out += f"[{part}]" if isinstance(part, int) else (f".{part}" if out else str(part))
    return out


def _explain(error: Any, raw: Any) -> str:
    """One pydantic error in a user's words."""
    location = list(error["loc"])
    path = _path(location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], raw)
        guess = nearest(str(location[-1]), known)
        hint = f"did you mean {guess!r}?" if guess else "known keys: " + ", ".join(known)
        return f"{path}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{path}: required key is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = error.get("input")
    if isinstance(given, dict | list) or error["type"] in {"value_error", "part_unknown"}:
        return f"{path}: {message}" if path else message
    return f"{path}: {message}, got {given!r}"


def _only_follows(error: Any, errors: Sequence[Any]) -> bool:
    """Whether a list seems too short only because its wrong entries do not count."""
    at = error["loc"]
    return error["type"] == "too_short" and any(
        len(other["loc"]) > len(at) and other["loc"][: len(at)] == at for other in errors
    )


def _switches(raw: Any, job: Any, location: tuple[Any, ...] = ()) -> Iterator[str]:
    """Complaints about places where the file says true or false and the job holds a number."""
    if isinstance(raw, bool) and not isinstance(job, bool):
        yield f"{_path(location)}: expected a number, got {str(raw).lower()}"
    elif isinstance(raw, dict) and isinstance(job, list):
        yield from _switches([raw], job, location)
    elif isinstance(raw, dict) and isinstance(job, dict):
        for key, value in raw.items():
            yield from _switches(value, job.get(key), (*location, key))
    elif isinstance(raw, list) and isinstance(job, list):
        for index, (value, held) in enumerate(zip(raw, job, strict=True)):
            yield from _switches(value, held, (*location, index))


def _known_keys(location: Sequence[Any], raw: Any) -> list[str]:
    """Field names that are allowed at `location` of the raw job."""
    model: type[BaseModel] | None = JobConfig
    node = raw
    for part in location:
        if isinstance(part, int):
            node = node[part] if isinstance(node, list) else node
            continue
        node = node.get(part) if isinstance(node, dict) else None
        if model is None or part not in model.model_fields:
            return []
        model = _model_in(model.model_fields[part].annotation)
    if model is not None and issubclass(model, PartConfig):
        model = _registered(model, node)
    return sorted(model.model_fields) if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `tuple[Annotated[Model, ...], ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _registered(base: type[PartConfig], node: Any) -> type[PartConfig]:
    """The registered class that a raw mapping of family `base` stands for."""
    kind = node.get("type") if isinstance(node, dict) else None
    for family in FAMILIES:
        if family.base is base and isinstance(kind, str):
            return family.get(kind) or base
    return base
