"""Merges that open nothing but the sum: the secure-aggregation protocol between the driver and the regions.

Before a round the regions of its cohort agree on keys (`open`). When their masked updates are there, they are added as
they are; the survivors sign who they are, give the shares that open the sum, and sign the sum; only then it is
applied (`merge`). Every message passes through here as bytes; the stages are those of `secure.member`, what is done
with them is `secure.server`'s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from xcloud.config import JobConfig
from xcloud.errors import MessageError, RegionError, SecurityError
from xcloud.manifest import ChunkLayout
from xcloud.messages import RegionReport, RoundPlan, RoundSum
from xcloud.secure.guard import KEPT, SCALE
from xcloud.secure.masks import Masker
from xcloud.secure.member import Signer, Verifier
from xcloud.secure.messages import (
    PLAN,
    Advert,
    Adverts,
    Delivered,
    Opening,
    SealedShares,
    SecureMessage,
    SignedPlan,
    Survivors,
    SyncPlan,
    Unmasking,
    Upload,
)
from xcloud.secure.server import Server
from xcloud.secure.settings import LEAST_GROUPS, SecureConfig
from xcloud.transport.blobs import Handle
from xcloud.transport.calls import later

__all__ = ["Adder", "MaskedAggregation", "Relay"]

M = TypeVar("M", bound=SecureMessage)


class Relay(Protocol):
    """Passes the protocol's messages to regions and back (`fleet.Fleet`)."""

    @property
    def idle(self) -> list[str]:
        """Regions that can take part in a round now."""
        ...

    def relay(self, stage: str, number: int, asked: Mapping[str, bytes]) -> dict[str, bytes]:
        """Ask regions by name; who fails or refuses is not in the answers."""
        ...

    def confirm(
        self, total: RoundSum, handles: Sequence[Any], result: bytes, names: Sequence[str]
    ) -> dict[str, bytes]:
        """Have regions look at a sum, and sign it."""
        ...


class Adder(Protocol):
    """Adds masked updates, and takes off a total what is left of the masks (`aggregation.ClusterAggregation`)."""

    def add(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Handle]],
        hashes: Mapping[str, tuple[str, ...]],
    ) -> tuple[RoundSum, list[Handle]]: ...

    def unmask(
        self, layout: Sequence[ChunkLayout], total: RoundSum, handles: Sequence[Handle], opening: Masker
    ) -> tuple[RoundSum, list[Handle], list[bytes]]: ...

    def open(self, plan: RoundPlan, fleet: Any) -> str | None: ...

    def restart(self) -> None: ...


def _start(told: bytes) -> int:
    """The latest start that a region knows of; 0 for nonsense. Starts that grow by one are never ahead of the clock, so one
    region's lie cannot use them up."""
    known = int(told) if told.isdigit() and len(told) < 20 else 0
    return known if known <= time.time_ns() // 1_000_000 else 0


@dataclass
class _Open:
    """A sync between its keys and its sum."""

    server: Server
    members: tuple[str, ...]
    """U2: who can be in the sum."""
    opened: tuple[Survivors, Masker] | None = None
    """What opens the sum of these survivors: regions give it once."""


class MaskedAggregation:
    """The aggregation actors of a job whose updates are masked.

    Args:
        job: the whole job.
        aggregation: adds what is masked.
        signer: the driver's identity.
        roster: everybody's.
        roster_hash: of it, as hex.
    """

    def __init__(
        self,
        job: JobConfig,
        aggregation: Adder,
        signer: Signer,
        roster: Verifier,
        roster_hash: str,
    ) -> None:
        assert isinstance(job.secure_aggregation, SecureConfig)
        self.job, self.config = job, job.secure_aggregation
        self._aggregation, self._signer = aggregation, signer
        self._roster, self._roster_hash = roster, roster_hash
        self._start = 0
        self._fleet: Relay | None = None
        self._open: dict[int, list[_Open]] = {}

    def open(self, plan: RoundPlan, fleet: Relay) -> str | None:
        """Like `agree`; returns why there are no keys, or None."""
        self._aggregation.open(plan, fleet)
        try:
            self.agree(plan, fleet)
        except SecurityError as error:
            return str(error)
        return None

    def agree(self, plan: RoundPlan, fleet: Relay) -> None:
        """Have the regions that are there agree on keys for a round.

        Raises:
            SecurityError: too few could.
        """
        self._fleet, idle = fleet, sorted(fleet.idle)
        if not self._start:
            starts = fleet.relay("start", plan.round, dict.fromkeys(idle, plan.job.encode()))
            self._start = 1 + max((_start(told) for told in starts.values()), default=0)
        names = [region.name for region in self.job.regions]
        syncs, reasons = [], []
        for group in self.config.dealt(names, plan.job, plan.round):
            try:
                syncs.append(self._keys(plan, [name for name in group if name in idle]))
            except SecurityError as error:
                reasons.append(str(error))
        if len(syncs) < self._least:
            raise SecurityError("; ".join(reasons))
        # As the regions do: the syncs of skipped rounds are never merged.
        self._open = {n: held for n, held in self._open.items() if n > plan.round - KEPT}
        self._open[plan.round] = syncs

    @property
    def _least(self) -> int:
        """Groups without which nothing is applied."""
        return 1 if self.config.groups == 1 else LEAST_GROUPS

    def _keys(self, plan: RoundPlan, cohort: Sequence[str]) -> _Open:
        """Have the regions of one sync agree on its keys."""
        assert self._fleet is not None, "set before anything is asked"
        signed = self._signed(plan, cohort)
        server = Server(signed, self._roster)
        adverts = server.adverts(self._ask("open", plan, dict.fromkeys(cohort, signed), Advert))
        first = [advert.name for advert in adverts]
        whole = Adverts(adverts=tuple(adverts))
        shares = server.shares(self._ask("share", plan, dict.fromkeys(first, whole), SealedShares))
        second = [message.name for message in shares]
        boxes = {name: Delivered(shares=tuple(server.for_one(name, shares))) for name in second}
        asked = {name: box.to_wire() for name, box in boxes.items()}
        return _Open(server, tuple(self._fleet.relay("receive", plan.round, asked)))

    def merge(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        reports: Sequence[RegionReport],
        updates: Sequence[Sequence[Handle]],
    ) -> Future[tuple[RoundSum, list[Handle]]]:
        """Merge in the actors; see `Aggregation.merge`. A region whose masked update is bad is left out.

        What has failed may be tried again with the keys of the round: the same survivors' sum is opened with what has
        opened it before.
        """
        offers = {r.region: (r, handles) for r, handles in zip(reports, updates, strict=True)}
        return later("the aggregator", lambda: self._merge(plan, layout, offers))

    def restart(self) -> None:
        """Fresh actors."""
        self._aggregation.restart()

    def _merge(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        offers: Mapping[str, tuple[RegionReport, Sequence[Handle]]],
    ) -> tuple[RoundSum, list[Handle]]:
        merged, reasons = [], []
        for sync in self._open[plan.round]:
            try:
                merged.append(self._merge_one(plan, layout, offers, sync))
            except SecurityError as error:
                reasons.append(error)
        if len(merged) < self._least:
            # The round is tried again with new keys, unless its sum was opened already.
            raise RegionError("the cohort", "; ".join(map(str, reasons))) from reasons[0]
        del self._open[plan.round]
        if self.config.groups == 1:
            return merged[0]
        names = [region.name for region in self.job.regions]
        whole = RoundSum.of_groups([total for total, _ in merged], names)
        return whole, [handle for _, handles in merged for handle in handles]

    def _merge_one(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        offers: Mapping[str, tuple[RegionReport, Sequence[Handle]]],
        sync: _Open,
    ) -> tuple[RoundSum, list[Handle]]:
        """The sum of one sync."""
        assert self._fleet is not None, "keys come first"
        server = sync.server
        uploads = self._uploads(plan, offers, sync)
        total, handles = self._add(plan, layout, offers, server, uploads)
        names = server.survivors.names
        if sync.opened is None or sync.opened[0] != server.survivors:
            sync.opened = server.survivors, self._opening(plan, server)
        opening = sync.opened[1]
        # Encrypted updates wear no masks: these hide what travels beside them, and the regions open the sum.
        streams = opening if self.config.scheme == "masks" else Masker()
        total, handles, hashes = self._aggregation.unmask(layout, total, handles, streams)
        result = server.result(hashes, opening)
        confirmed = self._fleet.confirm(total, handles, result.to_wire(), names)
        proof = server.proof(result, server.confirmed(result, confirmed), alone=self.config.groups == 1)
        changes = {"proof": proof.to_wire().decode(), "total_share": result.weight / SCALE}
        return total.model_copy(update=changes), handles

    def _uploads(
        self,
        plan: RoundPlan,
        offers: Mapping[str, tuple[RegionReport, Sequence[Handle]]],
        sync: _Open,
    ) -> dict[str, Upload]:
        """What regions have signed of their updates; who sends nonsense is left out."""
        uploads = {}
        for name, (report, _) in offers.items():
            if name not in sync.members:
                continue
            if report.round != plan.round:
                sync.server.faults[name] = f"{name!r} reports round {report.round}"
                continue
            try:
                uploads[name] = Upload.from_wire(report.upload.encode(), name)
            except MessageError as error:
                sync.server.faults[name] = str(error)
        return uploads

    def _opening(self, plan: RoundPlan, server: Server) -> Masker:
        """Have the survivors agree on who they are, and give their shares."""
        assert self._fleet is not None, "set before anything is asked"
        names, survivors = server.survivors.names, server.survivors
        signed = self._fleet.relay("agree", plan.round, dict.fromkeys(names, survivors.to_wire()))
        asked = Opening(survivors=survivors, quorum=server.agreed(signed))
        return server.opening(self._ask("unmask", plan, dict.fromkeys(names, asked), Unmasking))

    def _add(
        self,
        plan: RoundPlan,
        layout: Sequence[ChunkLayout],
        offers: Mapping[str, tuple[RegionReport, Sequence[Handle]]],
        server: Server,
        uploads: dict[str, Upload],
    ) -> tuple[RoundSum, list[Handle]]:
        """The masked total of all whose chunks are what they signed; the server then knows who these are."""
        first, stop = plan.chunks or (0, len(layout))
        while True:
            names = server.uploads(uploads, stop - first).names
            # Its share is in the masked lane; what a report says of it beside that is nobody's business.
            chosen = [
                (report.model_copy(update={"share": 1.0}), handles)
                for report, handles in offers.values()
                if report.region in names
            ]
            hashes = {name: tuple(found.hex() for found in uploads[name].hashes) for name in names}
            try:
                return self._aggregation.add(
                    plan, layout, [report for report, _ in chosen], [handles for _, handles in chosen], hashes
                )
            except RegionError as error:
                if error.region not in uploads:
                    raise
                server.faults[error.region] = str(error)
                del uploads[error.region]

    def _ask(
        self, stage: str, plan: RoundPlan, asked: Mapping[str, SecureMessage], answer: type[M]
    ) -> dict[str, M]:
        assert self._fleet is not None, "set before anything is asked"
        raw = self._fleet.relay(
            stage, plan.round, {name: message.to_wire() for name, message in asked.items()}
        )
        found = {}
        for name, data in raw.items():
            try:
                found[name] = answer.from_wire(data, name)
            except MessageError:
                continue  # the server counts who is left
        return found

    def _signed(self, plan: RoundPlan, cohort: Sequence[str]) -> SignedPlan:
        config, chunks = self.config, plan.chunks or (0, 0)
        sync = SyncPlan(
            job=plan.job,
            start=self._start,
            round=plan.round,
            attempt=plan.attempt,
            roster=self._roster_hash,
            cohort=tuple(cohort),
            threshold=config.threshold(len(cohort)),
            minimum=config.survivors,
            model=plan.model_digest,
            manifest=plan.manifest_digest,
            update=self.job.update_digest,
            chunks=chunks,
            most_weight=SCALE,
            tagged=config.verify,
            scheme=config.scheme,
        )
        raw = sync.to_wire()
        return SignedPlan(plan=raw, signature=self._signer.sign(PLAN, raw))
