"""The envelopes of a merge, arranged by the driver: who seals what for whom.

Before it merges, the driver asks the folders for fresh keys, and passes them on to the regions, which answer with the
headers of what they have sealed and with keys of their own for the way back. It sees headers and public keys only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from xcloud.config import JobConfig
from xcloud.errors import MessageError, RegionError
from xcloud.messages import RoundPlan
from xcloud.secure.envelope import ReceiverKey
from xcloud.secure.identity import Member, Role
from xcloud.secure.post import Letter, Mail, Posted, PostOrder, aggregator_name

__all__ = ["Arranged", "Mailing", "Parties"]


class Parties(Protocol):
    """Regions, asked by name (`fleet.Fleet`)."""

    @property
    def ready(self) -> list[str]:
        """Regions that can be asked now."""
        ...

    def relay(self, stage: str, number: int, asked: Mapping[str, bytes]) -> dict[str, bytes]:
        """Ask regions by name; who fails or refuses is not in the answers."""
        ...


class Folders(Protocol):
    """The folders of a job (`aggregation.Crew`)."""

    def ask(self, method: str, calls: Mapping[Any, tuple[Any, ...]]) -> dict[Any, Any]: ...


@dataclass(frozen=True)
class Arranged:
    """The envelopes of one merge.

    Attributes:
        attempt: of the merge; `manifest`: digest of the layout; `chunks`: ids that are merged.
        folders: keys of the root's folders.
        regions: keys of the regions that can open what comes back.
        letters: headers of what regions have sealed, by name.
        introduced: everybody, where no roster is pinned.
    """

    attempt: int
    manifest: str
    chunks: range
    folders: tuple[ReceiverKey, ...]
    regions: tuple[ReceiverKey, ...]
    letters: Mapping[str, Letter]
    introduced: tuple[Member, ...]

    def mail(
        self,
        letters: Mapping[str, Letter],
        to: Literal["nobody", "folders", "regions"],
    ) -> str:
        """What a folder needs to open these letters, and to seal what it makes of them."""
        return (
            Mail(
                attempt=self.attempt,
                manifest=self.manifest,
                chunks=(self.chunks.start, self.chunks.stop),
                letters=dict(letters),
                direction="up" if to == "folders" else "down",
                receivers={"nobody": (), "folders": self.folders, "regions": self.regions}[to],
                introduced=self.introduced,
            )
            .to_wire()
            .decode()
        )


class Mailing:
    """Arranges the envelopes of a job's merges.

    Args:
        job: the whole job.
        crew: the folders.
    """

    def __init__(self, job: JobConfig, crew: Folders) -> None:
        self.job, self.crew = job, crew
        self.parties: Parties | None = None

    def arrange(
        self, plan: RoundPlan, chunks: range, rounds: Mapping[str, int], root: Sequence[int]
    ) -> Arranged:
        """Have everybody's keys, and the senders' headers, for one merge.

        Args:
            plan: of the merge.
            chunks: that are merged.
            rounds: in which the updates that are merged were made, by region.
            root: numbers of the root's folders.

        Raises:
            RegionError: a region whose update is merged does not answer, or has nothing sealed.
            MessageError: a folder answers nonsense.
        """
        assert self.parties is not None, "set before anything is merged"
        for name, number in rounds.items():
            if not 1 <= number <= plan.round:
                raise RegionError(name, f"reports round {number}, expected 1 to {plan.round}")
        clouds = [cloud for cloud in self._clouds(rounds) if self.job.hierarchy.type == "cloud"]
        order = PostOrder(
            job=self.job.name, rounds=tuple(sorted({plan.round, *rounds.values()})), attempt=plan.attempt
        )
        asked = self.crew.ask("receiver", {who: (order.to_wire(),) for who in (*root, *clouds)})
        folders = {who: Posted.from_wire(answer, "aggregator") for who, answer in asked.items()}
        pinned = self.job.envelope is not None and self.job.envelope.keys is not None
        members = [_member(posted, "aggregator") for posted in folders.values()]
        order = order.model_copy(
            update={
                "rounds": (plan.round,),
                "receivers": tuple(key for posted in folders.values() for key in posted.keys),
                "introduced": () if pinned else tuple(members),
            }
        )
        posted = self._regions(plan, order, rounds, members)
        members += [_member(one, "region") for one in posted.values()]
        return Arranged(
            attempt=plan.attempt,
            manifest=plan.manifest_digest,
            chunks=chunks,
            folders=tuple(key for who in root for key in folders[who].keys if key.round == plan.round),
            regions=tuple(key for one in posted.values() for key in one.keys),
            letters={name: one.letter for name, one in posted.items() if one.letter is not None},
            introduced=() if pinned else tuple(members),
        )

    def _for(self, region: str, keys: Sequence[ReceiverKey]) -> tuple[ReceiverKey, ...]:
        """The folders that may open a region's update: the root's, and that of its own cloud."""
        near = aggregator_name(self.job.region(region).cloud)
        root = {aggregator_name(share) for share in range(self.job.aggregation_actors)}
        return tuple(key for key in keys if key.name in root or key.name == near)

    def _regions(
        self, plan: RoundPlan, order: PostOrder, rounds: Mapping[str, int], members: Sequence[Member]
    ) -> dict[str, Posted]:
        assert self.parties is not None, "set before anything is merged"
        asked = {
            name: order.model_copy(update={"receivers": self._for(name, order.receivers)}).to_wire()
            for name in dict.fromkeys((*rounds, *self.parties.ready))
        }
        answers = self.parties.relay("post", plan.round, asked)
        posted, taken = {}, {member.key for member in members}
        for name, data in answers.items():
            try:
                answer = Posted.from_wire(data, name)
            except MessageError:
                continue  # told below, if its update is to be merged; else it cannot open the sum, and is lost then
            if answer.card.name != name or answer.card.key in taken or not answer.card.proved:
                continue  # a key that is another's would have the others refuse the whole roster
            taken.add(answer.card.key)
            own = tuple(key for key in answer.keys if key.name == name and key.round == plan.round)
            posted[name] = answer.model_copy(update={"keys": own[:1]})
        for name in rounds:
            if name not in posted or posted[name].letter is None:
                raise RegionError(name, "its update came without an envelope")
        return posted

    def _clouds(self, names: Mapping[str, int]) -> list[str]:
        """Clouds of several of these regions: an actor in each merges them."""
        clouds = [self.job.region(name).cloud for name in names]
        return sorted({cloud for cloud in clouds if clouds.count(cloud) > 1})


def _member(posted: Posted, role: Role) -> Member:
    return Member(name=posted.card.name, role=role, key=posted.card.key)
