"""Envelopes with pinned keys in a whole job: the model of the job in the clear, and nothing of a region to be read on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import play
from tests.factory import raw_job, region
from xcloud.errors import KeyFileError
from xcloud.secure.identity import Member, Role, Roster
from xcloud.secure.keyring import Keyring
from xcloud.secure.vault import is_sealed

REGIONS = ("east", "west", "north")


def pinned(folder: Path) -> Path:
    """Keys of all parties of a job whose two clouds each have an aggregator, as far as they need one."""
    keys = folder / "keys"
    roles: dict[str, Role] = dict.fromkeys(REGIONS, "region")
    roles |= dict.fromkeys(("aggregator", "aggregator-1", "aggregator-of-aws"), "aggregator")
    made = Keyring(keys).make(list(roles))
    Roster.of(Member(name=key.name, role=roles[key.name], key=key.key) for key in made).save(
        keys / "roster.json"
    )
    return keys


@pytest.mark.slow
def test_pinned_envelopes_change_nothing_and_hide_what_regions_save(tmp_path: Path) -> None:
    """By way of a cloud's aggregator and two shares of the root, stopped and resumed."""
    pool = {"zero_stage": 0, "micro_batch": 2}
    regions = [region(tmp_path, name, i, pool) for i, name in enumerate(REGIONS)]
    for one, cloud in zip(regions, ("aws", "aws", "gcp"), strict=True):
        one["cloud"] = cloud
    raw = raw_job(tmp_path, regions, hierarchy="cloud", aggregation_actors=2, rounds=3)
    clear = play(raw | {"envelope": None}, tmp_path / "clear")
    keys = pinned(tmp_path)
    sealed = raw | {"envelope": {"keys": str(keys)}}
    assert play(sealed, tmp_path / "sealed", stop_after=1).round == 1
    done = play(sealed, tmp_path / "sealed", resume=True)
    assert done.model_digest == clear.model_digest
    assert done.round == 3
    files = list((tmp_path / "sealed" / "checkpoints").glob("round-*/regions/*/*.safetensors"))
    assert files
    assert all(is_sealed(file.read_bytes()) for file in files)
    (keys / "aggregator-1.key").unlink()
    with pytest.raises(KeyFileError, match="no key of 'aggregator-1' here"):
        play(sealed, tmp_path / "unkeyed")
