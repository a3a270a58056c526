"""The merge of a round, seen from the driver: who folds what, and how the results join.

The weights are computed here, once, from all reports. One aggregation actor folds all chunks, or several
(`aggregation_actors`) fold a contiguous share each; with `hierarchy: cloud` the regions of one cloud are merged by
an actor in it, before their updates cost egress. The sum has the same bits whoever folds which chunks.
Nothing here touches an update: it stays between the regions and the folders (`xcloud.folding`).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from xcloud.aggregators import Gram
from xcloud.config import JobConfig, dump_job
from xcloud.errors import AggregationError, NonFiniteUpdateError, PlacementError, RegionError
from xcloud.folding import Folder
from xcloud.mailing import Arranged, Mailing
from xcloud.manifest import ChunkLayout
from xcloud.messages import (
    Folded,
    FoldOrder,
    RegionReport,
    RoundPlan,
    RoundSum,
    Source,
    Unmasked,
    UnmaskOrder,
)
from xcloud.parts import Bundle
from xcloud.policies import BufferConfig
from xcloud.secure.masks import Masker
from xcloud.secure.post import Letter, PostOrder, aggregator_name
from xcloud.transport.blobs import Copies, Handle, RayBlobs
from xcloud.transport.calls import gather, in_own_words, later
from xcloud.update import adds_up, clip_margin

__all__ = ["Aggregation", "AggregatorHandle", "ClusterAggregation", "Crew"]

Who = TypeVar("Who", int, str)
"""A folder: the number of its share of the chunks, or the name of its cloud."""


class Crew(Protocol):
    """The folders of a job."""

    def ask(self, method: str, calls: Mapping[Who, tuple[Any, ...]]) -> dict[Who, Any]:
        """Call a method of several folders at once, with each one's own arguments.

        Raises:
            XCloudError: the first failure.
        """
        ...


@dataclass(frozen=True)
class _Sent:
    """One update on its way into the sum, encoded in `round`; `relayed`: it is a cloud's mean already.

    `hashes`: SHA-256 that its chunks must have, in hex; none where updates are not masked. `letter`: header of its
    envelope, of a cloud's mean; those of regions are with the rest of the mail.
    """

    name: str
    weight: float
    bundle: Bundle
    round: int
    relayed: bool = False
    hashes: tuple[str, ...] = ()
    letter: str = ""


class Aggregation:
    """Merges the updates of one round.

    Args:
        job: says how updates combine, and who folds.
        crew: the folders.
    """

    def __init__(self, job: JobConfig, crew: Crew) -> None:
        self.job, self.crew = job, crew
        self.aggregator = job.aggregator.build()
        self.summed = adds_up(job.coding.build())

    def merge(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Handle]],
        hashes: Mapping[str, tuple[str, ...]] | None = None,
        arranged: Arranged | None = None,
    ) -> tuple[RoundSum, list[Handle]]:
        """Combine the regions' updates of the plan's chunks.

        Args:
            plan: of the round.
            layout: of each chunk of the model.
            reports: in the job's order of regions.
            updates: for each report, one handle for each of its parts.
            hashes: by region, SHA-256 that each chunk must have, in hex: they are masked.
            arranged: their envelopes; None: they travel as they are.

        Raises:
            RegionError: a region's update is malformed, holds other chunks than planned, is not finite or is lost.
            AggregationError: reports that do not belong to this round, or a non-finite sum.
        """
        began = time.perf_counter()
        chunks = range(*plan.chunks) if plan.chunks else range(len(layout))
        for report, handles in zip(reports, updates, strict=True):
            _check(plan, chunks, report, handles, self.job.buffer)
        total_share = math.fsum(report.share for report in reports)
        if self.summed and not total_share > 0:
            raise AggregationError(f"round {plan.round}: the regions' shares sum to {total_share}")
        sent = [
            _Sent(
                report.region,
                1.0,
                Bundle(report.parts, report.chunk_bytes, tuple(handles)),
                report.round,
                hashes=hashes[report.region] if hashes else (),
            )
            for report, handles in zip(reports, updates, strict=True)
        ]
        weights = self._weights(plan, layout, chunks, reports, sent, arranged)
        sent = [replace(one, weight=weight) for one, weight in zip(sent, weights, strict=True)]
        near: tuple[str, ...] = ()
        if self.job.hierarchy.type == "cloud":
            sent, near = self._by_cloud(plan, layout, chunks, sent, arranged)
        # A masked total is not for the regions yet.
        mail = _mail(arranged, sent, "nobody" if hashes is not None else "regions")
        merged, norms, letters = self._fold(plan, layout, dict(enumerate(self.shares(chunks))), sent, mail)
        summary = RoundSum(
            round=plan.round,
            attempt=plan.attempt,
            regions=tuple(r.region for r in reports),
            weights=self._told(weights),
            chunk_bytes=merged.sizes,
            parts=merged.parts,
            norm=None if self.summed else math.sqrt(sum(norms)),
            summed=self.summed,
            total_share=total_share,
            egress_up=sum(sum(one.bundle.sizes) for one in sent),
            near=near,
            letters=letters,
            fold_s=time.perf_counter() - began,
        )
        if not near:
            return summary, list(merged.handles)
        copies = self.crew.ask("copy", {cloud: (list(merged.handles),) for cloud in near})
        return summary, [
            Copies(handle, {cloud: copied[part] for cloud, copied in copies.items()})
            for part, handle in enumerate(merged.handles)
        ]

    def _told(self, weights: Sequence[float]) -> tuple[float, ...]:
        """The weights as regions are told them: clipping would say how long each update was."""
        if self.job.dp is not None and self.job.dp.central:
            return (1 / len(self.job.regions),) * len(weights)
        return tuple(weights)

    def unmask(
        self,
        layout: Sequence[ChunkLayout],
        total: RoundSum,
        handles: Sequence[Handle],
        opening: Masker,
        arranged: Arranged | None = None,
    ) -> tuple[RoundSum, list[Handle], list[bytes]]:
        """Open a total of masked encodings; also the SHA-256 of each of its chunks."""
        mail = _mail(arranged, (), "regions")
        whole, calls = Bundle(total.parts, total.chunk_bytes, tuple(handles)), {}
        for who, share in enumerate(self.shares(total.chunks)):
            part = whole.within(share)
            order = UnmaskOrder(
                round=total.round,
                chunk_bytes=part.sizes,
                parts=part.parts,
                added=tuple(key.hex() for key in opening.added),
                taken=tuple(key.hex() for key in opening.taken),
                mail=mail,
            )
            calls[who] = (order.to_wire(), [(c.length, c.matrices) for c in layout], list(part.handles))
        answers = self.crew.ask("unmask", calls)
        opened = [Unmasked.from_wire(answers[who][0], "aggregator") for who in calls]
        merged = Bundle.join(
            Bundle(one.parts, one.chunk_bytes, tuple(answers[who][1]))
            for who, one in zip(calls, opened, strict=True)
        )
        letters = tuple(one.letter for one in opened if one.letter)
        changes = {"chunk_bytes": merged.sizes, "parts": merged.parts, "letters": letters}
        summary = total.model_copy(update=changes)
        found = [bytes.fromhex(digest) for one in opened for digest in one.hashes]
        return summary, list(merged.handles), found

    def _weights(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        chunks: range,
        reports: Sequence[RegionReport],
        sent: Sequence[_Sent],
        arranged: Arranged | None,
    ) -> list[float]:
        """What each region's update counts."""
        if self.job.dp is not None and self.job.dp.central:
            return self._clipped(plan, layout, chunks, sent, self.job.dp.clip_norm, arranged)
        gram: Gram | None = None
        if self.aggregator.needs_gram:
            shares = dict(enumerate(self.shares(chunks)))
            mail = _mail(arranged, sent, "nobody")
            calls = {who: _call(plan, layout, s, sent, mail) for who, s in shares.items()}
            parts = self.crew.ask("gram", calls)
            gram = np.concatenate([parts[who] for who in shares]).sum(axis=0)  # chunk by chunk: the same bits
        weights, buffer = self.aggregator.weights(reports, gram), self.job.buffer
        if buffer is None:
            return weights
        return [weight * buffer.factor(r.staleness) for weight, r in zip(weights, reports, strict=True)]

    def _clipped(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        chunks: range,
        sent: Sequence[_Sent],
        most: float,
        arranged: Arranged | None,
    ) -> list[float]:
        """Weights with which no update is longer than `most`, as it arrived, over the number of the job's regions,
        whoever of them is there.

        Raises:
            NonFiniteUpdateError: an update has no norm.
        """
        shares, mail = dict(enumerate(self.shares(chunks))), _mail(arranged, sent, "nobody")
        parts = self.crew.ask("norms", {who: _call(plan, layout, s, sent, mail) for who, s in shares.items()})
        norms = np.sqrt(np.concatenate([parts[who] for who in shares]).sum(axis=0))
        for one, norm in zip(sent, norms, strict=True):
            if not np.isfinite(norm):
                raise NonFiniteUpdateError(one.name, "its update holds NaN or Inf")
        weights = (1 - clip_margin(len(self.job.regions))) * np.minimum(1.0, most / np.maximum(norms, most))
        return [float(weight) / len(self.job.regions) for weight in weights]

    def _by_cloud(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        chunks: range,
        sent: Sequence[_Sent],
        arranged: Arranged | None,
    ) -> tuple[list[_Sent], tuple[str, ...]]:
        """Merge the regions of each cloud that has several; returns what goes on, and those clouds."""
        clouds: dict[str, list[_Sent]] = {}
        for one in sent:
            clouds.setdefault(self.job.region(one.name).cloud, []).append(one)
        calls, totals = {}, {}
        for cloud, members in clouds.items():
            if len(members) > 1:
                total = totals[cloud] = math.fsum(member.weight for member in members)
                inner = [replace(m, weight=m.weight / total if total else 0.0) for m in members]
                calls[cloud] = _call(plan, layout, chunks, inner, _mail(arranged, inner, "folders"))
        answers = self.crew.ask("fold", calls)
        going = []
        for cloud, members in clouds.items():
            if cloud not in totals:
                going.append(members[0])
                continue
            bundle, _, letter = _bundle(answers[cloud])
            name = aggregator_name(cloud)
            going.append(_Sent(name, totals[cloud], bundle, plan.round, relayed=True, letter=letter))
        return going, tuple(totals)

    def _fold(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        shares: Mapping[int, range],
        sent: Sequence[_Sent],
        mail: str,
    ) -> tuple[Bundle, list[float], tuple[str, ...]]:
        """The root's fold: the merged update, the squared norm of each chunk, and the headers of its envelopes."""
        answers = self.crew.ask(
            "fold", {who: _call(plan, layout, s, sent, mail) for who, s in shares.items()}
        )
        folded = [_bundle(answers[who]) for who in shares]
        return (
            Bundle.join(bundle for bundle, _, _ in folded),
            [norm for _, norms, _ in folded for norm in norms],
            tuple(letter for _, _, letter in folded if letter),
        )

    def shares(self, chunks: range) -> list[range]:
        """Contiguous shares of `chunks`, one for each aggregation actor that gets any."""
        count = self.job.aggregation_actors
        cuts = [chunks.start + len(chunks) * i // count for i in range(count + 1)]
        return [range(a, b) for a, b in pairwise(cuts) if a < b]


def _check(
    plan: RoundPlan,
    chunks: range,
    report: RegionReport,
    handles: Sequence[Handle],
    buffer: BufferConfig | None,
) -> None:
    """Refuse a report of another round (a later one, where they are buffered) or of other chunks than planned."""
    if report.round > plan.round or (report.round < plan.round and not buffer):
        raise AggregationError(f"{report.region!r} reports round {report.round}, expected {plan.round}")
    at = chunks.start
    for first, count in report.parts:
        if first != at or count < 1:
            break
        at += count
    if at != chunks.stop or len(report.chunk_bytes) != len(chunks) or len(handles) != len(report.parts):
        held = ", ".join(f"{first}..{first + count - 1}" for first, count in report.parts)
        raise RegionError(
            report.region,
            f"sent {len(report.chunk_bytes)} chunks ({held or 'none'}) in {len(handles)} buffers, "
            f"expected chunks {chunks.start}..{chunks.stop - 1} in {len(report.parts)}",
        )


def _mail(
    arranged: Arranged | None, sent: Sequence[_Sent], to: Literal["nobody", "folders", "regions"]
) -> str:
    """What opens these updates, and whom the result is sealed for; nothing where there are no envelopes."""
    if arranged is None:
        return ""
    letters = {
        one.name: Letter.from_wire(one.letter.encode(), one.name)
        if one.letter
        else arranged.letters[one.name]
        for one in sent
    }
    return arranged.mail(letters, to)


def _call(
    plan: RoundPlan,
    layout: Sequence[ChunkLayout],
    chunks: range,
    sent: Sequence[_Sent],
    mail: str,
) -> tuple[bytes, list[Any], list[list[Handle]]]:
    """Arguments of `Folder.fold` and `Folder.gram`, with no more than the parts that hold `chunks`."""
    cut = [one.bundle.within(chunks) for one in sent]
    sources = tuple(
        Source(
            name=one.name,
            weight=one.weight,
            round=one.round,
            relayed=one.relayed,
            chunk_bytes=bundle.sizes,
            parts=bundle.parts,
            hashes=one.hashes[bundle.first - one.bundle.first :][: len(bundle.sizes)],
        )
        for one, bundle in zip(sent, cut, strict=True)
    )
    order = FoldOrder(round=plan.round, chunks=(chunks.start, chunks.stop), sources=sources, mail=mail)
    return order.to_wire(), [(c.length, c.matrices) for c in layout], [list(b.handles) for b in cut]


def _bundle(answer: tuple[bytes, Sequence[Handle]]) -> tuple[Bundle, tuple[float, ...], str]:
    """What `Folder.fold` answered: chunks, squared norms, header of the envelope."""
    folded = Folded.from_wire(answer[0], "aggregator")
    bundle = Bundle(folded.parts, folded.chunk_bytes, tuple(answer[1]))
    return bundle, folded.norms_squared, folded.letter


class AggregatorHandle(Protocol):
    """The aggregation actors as the driver sees them."""

    def merge(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Any]],
    ) -> Future[tuple[RoundSum, list[Any]]]: ...

    def open(self, plan: RoundPlan, fleet: Any) -> str | None: ...

    def restart(self) -> None: ...


class ClusterAggregation:
    """The aggregation actors of a job in its Ray cluster.

    Args:
        job: the whole job.
        enforce_labels: place a cloud's actor on a node with the label `cloud`.
    """

    def __init__(self, job: JobConfig, enforce_labels: bool = False) -> None:
        self._job, self._enforce_labels = dump_job(job), enforce_labels
        self._shares = job.aggregation_actors
        self._aggregation = Aggregation(job, self)
        self._mailing = Mailing(job, self) if job.envelope is not None else None
        self._arranged: dict[int, Arranged | None] = {}  # of masked rounds between their two stages
        self._lock = threading.Lock()  # merges may be in flight side by side
        self.actors: dict[int | str, Any] = {}
        self.restart()

    @property
    def reader(self) -> Any:
        """The actor that will fold all of every region's update, if there is one such."""
        return (
            self.actors[0]
            if len(self.actors) == 1 and self._aggregation.job.hierarchy.type == "flat"
            else None
        )

    def merge(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Handle]],
    ) -> Future[tuple[RoundSum, list[Handle]]]:
        """Merge in the actors; see `Aggregation.merge`."""

        def merged() -> tuple[RoundSum, list[Handle]]:
            arranged = self._arrange(plan, layout, reports)
            return self._aggregation.merge(plan, layout, reports, updates, arranged=arranged)

        return later("the aggregator", merged)

    def _arrange(
        self, plan: RoundPlan, layout: Sequence[ChunkLayout], reports: Sequence[RegionReport]
    ) -> Arranged | None:
        """Everybody's keys and headers for a merge; None where there are no envelopes."""
        if self._mailing is None:
            return None
        chunks = range(*plan.chunks) if plan.chunks else range(len(layout))
        rounds = {report.region: report.round for report in reports}
        return self._mailing.arrange(plan, chunks, rounds, range(len(self._aggregation.shares(chunks))))

    def open(self, plan: RoundPlan, fleet: Any) -> str | None:
        """What stands in the way of a round; nothing where updates are not masked."""
        if self._mailing is not None and self._mailing.parties is None:
            # A key that is missing is told before a round was trained, and not after.
            order = PostOrder(job=plan.job, rounds=(plan.round,), attempt=plan.attempt)
            try:
                self.ask("receiver", {share: (order.to_wire(),) for share in range(self._shares)})
            except ray.exceptions.RayError as error:
                said = in_own_words("the aggregator", error)
                if isinstance(said, RegionError):
                    return str(said)
                raise said from None
            self._mailing.parties = fleet
        return None

    def add(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Handle]],
        hashes: Mapping[str, tuple[str, ...]],
    ) -> tuple[RoundSum, list[Handle]]:
        """The total of masked updates whose chunks have these SHA-256; see `Aggregation.merge`."""
        try:
            arranged = self._arranged[plan.round] = self._arrange(plan, layout, reports)
            return self._aggregation.merge(plan, layout, reports, updates, hashes, arranged)
        except ray.exceptions.RayError as error:
            raise in_own_words("the aggregator", error) from None

    def unmask(
        self, layout: Sequence[ChunkLayout], total: RoundSum, handles: Sequence[Handle], opening: Masker
    ) -> tuple[RoundSum, list[Handle], list[bytes]]:
        """See `Aggregation.unmask`."""
        arranged = self._arranged.pop(total.round)
        try:
            return self._aggregation.unmask(layout, total, handles, opening, arranged)
        except ray.exceptions.RayError as error:
            raise in_own_words("the aggregator", error) from None

    def restart(self) -> None:
        """Fresh actors; they hold no state worth saving. A cloud's comes when it is needed: its nodes may
        come up with its regions."""
        with self._lock:
            for actor in self.actors.values():
                ray.kill(actor)
            self.actors = {share: self._start(None, share) for share in range(self._shares)}

    def ask(self, method: str, calls: Mapping[Who, tuple[Any, ...]]) -> dict[Who, Any]:
        """Call a method of several actors at once; see `Crew`."""
        with self._lock:
            for who in calls:
                if who not in self.actors:
                    self.actors[who] = self._start(str(who))
            references = [getattr(self.actors[who], method).remote(*args) for who, args in calls.items()]
        return dict(zip(calls, gather(references), strict=True))

    def _start(self, cloud: str | None, share: int = 0) -> Any:
        here = ray.get_runtime_context().get_node_id()
        options: dict[str, Any] = {"num_cpus": 0}
        if cloud is None and self._shares > 1:
            options["scheduling_strategy"] = "SPREAD"
        elif cloud is None:  # at the hub, beside the driver
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=True)
        if cloud is not None and self._enforce_labels:
            if not any(node["Alive"] and node["Labels"].get("cloud") == cloud for node in ray.nodes()):
                raise PlacementError(f"hierarchy: no live node carries the label cloud={cloud}")
            options["label_selector"] = {"cloud": cloud}
        return ray.remote(Folder).options(**options).remote(self._job, RayBlobs(cloud), cloud, share)
