"""Everything that crosses a region's boundary: schema-checked headers beside raw buffers.

A message is a frozen, versioned header that travels as JSON; bulk data travels beside it
as raw chunk buffers, named by chunk id. Pickle never crosses a region boundary, so a
region that shares the hub's Ray cluster and one that dials in speak the same language.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xcloud.errors import MessageError

__all__ = [
    "Applied",
    "CheckpointFile",
    "Encryption",
    "FoldOrder",
    "Folded",
    "Message",
    "PoolReport",
    "PrivacyTerms",
    "Progress",
    "RankInfo",
    "RegionReady",
    "RegionReport",
    "RestoreOrder",
    "RoundPlan",
    "RoundSum",
    "SaveOrder",
    "Saved",
    "Source",
    "UnmaskOrder",
    "Unmasked",
    "json_safe",
]

M = TypeVar("M", bound="Message")


class Message(BaseModel):
    """Base of all headers: immutable, versioned, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")
    version: Literal[1] = 1

    def to_wire(self) -> bytes:
        """The header as UTF-8 JSON."""
        return self.model_dump_json().encode()

    @classmethod
    def from_wire(cls: type[M], data: bytes, sender: str) -> M:
        """Parse a header from `sender`.

        Raises:
            MessageError: the bytes are not this message; names sender and field.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(p) for p in first["loc"]) or "header"
            raise MessageError(f"{cls.__name__} from {sender!r}: {where}: {first['msg']}") from None


class RankInfo(Message):
    """What one rank holds, so that sharding can be seen."""

    rank: int
    node: str
    device: str
    parameter_bytes: int
    optimizer_state_bytes: int
    owned_chunks: int


class PrivacyTerms(Message):
    """Under which a region releases anything that its data had a part in.

    `unit` is what epsilon protects. Each step releases a sum of contributions, clipped to a common norm, of units that
    `sampler` has picked with `sampling_probability`, plus noise of `noise_multiplier` times that norm: Gaussian, or, on a grid,
    Skellam noise of which `skellam` gives variance, L1 and L2 sensitivity in steps of the grid.
    """

    unit: Literal["example", "region"]
    sampler: Literal["poisson", "shuffled"] = "poisson"
    sampling_probability: float = Field(gt=0, le=1)
    noise_multiplier: float = Field(gt=0)
    skellam: tuple[float, float, float] | None = None


class Encryption(Message):
    """What homomorphic encryption costs a region in one merge of the whole model, from a short probe in its process.

    `seconds` are of encrypting its update and decrypting the sum, spread over the ranks of its first pool.
    """

    plain_bytes: int
    sent_bytes: int
    encrypt_mb_per_s: float
    decrypt_mb_per_s: float
    seconds: float


class RegionReady(Message):
    """A region has its engines up and a model in place.

    `layout` gives each chunk's elements and matrices, as in `manifest.ChunkLayout`, `fragments` the half-open
    range of chunk ids of each fragment. `privacy`: of its training; None without differential privacy. `encryption`: None
    where updates are not encrypted homomorphically.
    """

    region: str
    privacy: PrivacyTerms | None = None
    encryption: Encryption | None = None
    manifest_digest: str
    model_digest: str
    parameters: int
    chunks: int
    data: str
    data_fingerprint: str = ""
    train_sequences: int
    pools: tuple[tuple[RankInfo, ...], ...]
    eval_loss: float
    eval_tokens: int
    layout: tuple[tuple[int, tuple[tuple[int, int, int], ...]], ...]
    fragments: tuple[tuple[int, int], ...] = ()


class RoundPlan(Message):
    """What the driver asks of every region in one attempt at one round.

    `chunks` is the half-open range of chunk ids that the round merges, its fragment; None: all of them.
    `landing` is the earlier round whose merged update arrives during this one, to be taken up on the way.
    `inner_steps` are the job's; `steps`, where regions are balanced, those of each region instead.
    """

    job: str
    round: int = Field(ge=1)
    attempt: int = Field(ge=1)
    model_digest: str
    manifest_digest: str
    inner_steps: int = Field(ge=0)
    steps: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    chunks: tuple[int, int] | None = None
    landing: int | None = None

    def steps_of(self, region: str) -> int:
        """Inner steps of a region, each of one step of all its pools."""
        return self.steps.get(region, self.inner_steps)


class Progress(Message):
    """How far a region is in its current round; asked for while it works."""

    region: str
    round: int
    step: int
    steps: int
    tokens: int
    loss: float | None
    tokens_per_s: float


class PoolReport(Message):
    """What one pool did in one round."""

    pool: int
    tokens: int
    loss_sum: float
    steps: int
    compute_s: float


class RegionReport(Message):
    """A region's finished local work, ready to be merged.

    `share` is what the region has multiplied its update by before encoding it, where encodings add up.
    `chunk_bytes[i]` is the encoded length of chunk `i`; `parts` says which chunks share a buffer
    (first chunk, number of chunks). The buffers travel beside this, one for each part.
    `staleness` is the number of merges since the model that it started from; the driver fills it in.
    `upload`, where updates are masked, is what the region has signed of its own (`secure.messages.Upload`).
    `landing_s` are the seconds of the round in which no inner step ran because an earlier merge was taken up. `leaving`: the region's
    machines are about to be taken away, so that it has ended its round early, and needs others for the next.
    """

    region: str
    round: int
    attempt: int
    tokens: int
    train_loss: float
    update_norm: float
    share: float = 1.0
    cursor: int
    chunk_bytes: tuple[int, ...]
    parts: tuple[tuple[int, int], ...] = ()
    compute_s: float
    encode_s: float
    landing_s: float = 0.0
    staleness: int = 0
    upload: str = ""
    leaving: bool = False
    pools: tuple[PoolReport, ...]

    @property
    def bytes_up(self) -> int:
        return sum(self.chunk_bytes)


class Source(Message):
    """One update to fold: a region's, or (`relayed`) the mean of a cloud's regions. Fields as in `RegionReport`.

    `hashes` are the SHA-256 that each chunk must have, where the region has signed them.
    """

    name: str
    weight: float
    round: int
    relayed: bool
    chunk_bytes: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]
    hashes: tuple[str, ...] = ()


class FoldOrder(Message):
    """What one folder is asked to fold: a half-open range of chunk ids, of these updates in this order.

    `mail`, where updates travel in envelopes, says how to open them and for whom to seal (`secure.post.Mail`).
    """

    round: int
    chunks: tuple[int, int]
    sources: tuple[Source, ...]
    mail: str = ""


class Folded(Message):
    """What a folder has folded; its buffers travel beside this. No norms where it has opened nothing.

    `letter` is the header of the envelope that the chunks are in, where they are in one (`secure.post.Letter`).
    """

    chunk_bytes: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]
    norms_squared: tuple[float, ...]
    letter: str = ""


class UnmaskOrder(Message):
    """What one folder is asked to open: a total of its own, by the keys of the streams that did not cancel.

    `mail` as in `FoldOrder`.
    """

    round: int
    chunk_bytes: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]
    added: tuple[str, ...]
    taken: tuple[str, ...]
    mail: str = ""


class Unmasked(Message):
    """The opened total: SHA-256 of each chunk. Its buffers travel beside this, cut as the total was; `letter` as in `Folded`."""

    chunk_bytes: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]
    hashes: tuple[str, ...]
    letter: str = ""


class RoundSum(Message):
    """The merged update of one round; its buffers travel beside this, one for each part.

    Either a total of the regions' encodings (`summed`, to be divided by `total_share`), which only the
    regions can decode, or the weighted combination, encoded with the job's downlink codec (its `norm` is
    then known). `lands_in` is the round during which it is taken up; None: at once. A sum of no regions changes
    nothing: the round was given up while the next was under way. `egress_up` counts the bytes that crossed between clouds on the way up (None: all of them
    did); `near` names the clouds that have a copy of the merged update for all their regions. `proof`, where updates were
    masked, is what the regions have signed of it (`secure.messages.Proof`). `letters` are the headers of the envelopes that
    the chunks are in, one for each aggregation actor, where they are in envelopes (`secure.post.Letter`). `groups` are the
    sums of groups of regions, whose median is applied; this is then what they have in common, and all buffers travel beside it.
    """

    round: int
    attempt: int
    regions: tuple[str, ...]
    weights: tuple[float, ...]
    chunk_bytes: tuple[int, ...]
    parts: tuple[tuple[int, int], ...] = ()
    norm: float | None
    fold_s: float
    summed: bool = False
    total_share: float = 1.0
    lands_in: int | None = None

    @classmethod
    def of_nothing(cls, plan: RoundPlan, lands_in: int | None) -> RoundSum:
        """The sum of a round that was given up."""
        return cls(
            round=plan.round,
            attempt=plan.attempt,
            regions=(),
            weights=(),
            chunk_bytes=(),
            norm=None,
            fold_s=0.0,
            lands_in=lands_in,
        )

    @property
    def chunks(self) -> range:
        """Chunk ids that were merged."""
        first = self.parts[0][0] if self.parts else 0
        return range(first, first + len(self.chunk_bytes))

    egress_up: int | None = None
    near: tuple[str, ...] = ()
    proof: str = ""
    letters: tuple[str, ...] = ()
    groups: tuple[RoundSum, ...] = ()

    @classmethod
    def of_groups(cls, groups: Sequence[RoundSum], order: Sequence[str]) -> RoundSum:
        """The sums of several groups of regions, whose median is to be applied.

        Args:
            groups: in any order; their buffers follow one another in this order.
            order: of the job's regions.
        """
        first = groups[0]
        weights = {r: w for group in groups for r, w in zip(group.regions, group.weights, strict=True)}
        names = tuple(name for name in order if name in weights)
        return first.model_copy(
            update={
                "regions": names,
                "weights": tuple(weights[name] for name in names),
                "chunk_bytes": tuple(
                    sum(sizes) for sizes in zip(*(g.chunk_bytes for g in groups), strict=True)
                ),
                "total_share": sum(group.total_share for group in groups),
                "egress_up": sum(group.egress_up or 0 for group in groups),
                "fold_s": sum(group.fold_s for group in groups),
                "proof": "",
                "letters": (),
                "groups": tuple(groups),
            }
        )

    @property
    def bytes_down(self) -> int:
        return sum(self.chunk_bytes)


class Applied(Message):
    """A region has applied the outer step of one round.

    `pools` is filled after the first round since the start, when the optimizers hold their state.
    `bytes_down` is what the region has fetched for it, and for the merges before it that it had missed.
    `norm` is the merged update's L2 norm, where the job has guards that want it. `endorsement`, where updates are masked,
    is the region's signature: this model came of a sum that the regions have signed.
    """

    region: str
    round: int
    model_digest: str
    eval_loss: float
    eval_tokens: int
    bytes_down: int = 0
    norm: float | None = None
    endorsement: str = ""
    apply_s: float
    eval_s: float
    pools: tuple[tuple[RankInfo, ...], ...] = ()


class CheckpointFile(Message):
    """One file of a checkpoint, as its writer saw it."""

    path: str
    size: int
    digest: str


class SaveOrder(Message):
    """Write this region's state of a committed round; the donor also writes the model."""

    round: int = Field(ge=0)
    donor: bool


class Saved(Message):
    """What a region has written."""

    region: str
    round: int
    files: tuple[CheckpointFile, ...]


class RestoreOrder(Message):
    """Load a committed round.

    `inner_round` is the round whose inner optimizer state to load (None: start it fresh);
    it may be older than `round` for a region that comes back after a failure. `endorsements` are those of `Applied`, by region.
    """

    round: int = Field(ge=0)
    inner_round: int | None
    cursor: int
    model_digest: str
    files: tuple[CheckpointFile, ...]
    endorsements: dict[str, str] = Field(default_factory=dict)


def json_safe(message: Message) -> dict[str, Any]:
    """The message as plain JSON types, for event logs."""
    return message.model_dump(mode="json", exclude={"version"})
