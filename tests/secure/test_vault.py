"""What a region keeps outside its machine opens for this region alone, in its own place, and as it was."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import quick
from xcloud.errors import TamperError
from xcloud.secure.identity import Identity
from xcloud.secure.keyring import Keyring
from xcloud.secure.vault import Vault, is_sealed

ONE, OTHER = Identity.generate("us"), Identity.generate("us")
TEXT = b"moments and residuals" * 100


def vault(identity: Identity = ONE, job: str = "job", strict: bool = True) -> Vault:
    return Vault.of([identity], job, strict)


@quick
@given(st.binary(max_size=300), st.integers(0, 2**40), st.text(max_size=20))
def test_a_file_opens_as_it_was(data: bytes, round: int, path: str) -> None:
    sealed = vault().seal(data, round, path)
    assert is_sealed(sealed)
    assert vault().open(sealed, "file", round, path) == data


def test_nothing_of_it_can_be_read_and_no_two_files_are_alike() -> None:
    one, again = vault().seal(TEXT, 1, "p"), vault().seal(TEXT, 1, "p")
    assert TEXT[:16] not in one
    assert len({one[16:], again[16:]}) == 2
    assert one[16:48] != again[16:48]
    assert one[48:80] != again[48:80]


@pytest.mark.parametrize(
    "opening",
    [
        lambda sealed: vault().open(sealed, "file", 2, "p"),
        lambda sealed: vault().open(sealed, "file", 1, "q"),
        lambda sealed: vault(job="other").open(sealed, "file", 1, "p"),
        lambda sealed: vault(OTHER).open(sealed, "file", 1, "p"),
        lambda sealed: vault(Identity("eu", ONE._key)).open(sealed, "file", 1, "p"),
        lambda sealed: vault().open(sealed[:-1], "file", 1, "p"),
        lambda sealed: vault().open(sealed[:20], "file", 1, "p"),
        lambda sealed: vault().open(sealed + b"x", "file", 1, "p"),
    ],
)
def test_another_round_path_job_region_or_key_does_not_open_it(opening: object) -> None:
    sealed = vault().seal(TEXT, 1, "p")
    with pytest.raises(TamperError, match="file: does not open with the key of region '"):
        opening(sealed)  # type: ignore[operator]


@quick
@given(st.integers(16, 2000), st.integers(0, 7))
def test_an_altered_bit_is_told(at: int, bit: int) -> None:
    sealed = bytearray(vault().seal(TEXT, 1, "p"))
    sealed[at % len(sealed)] ^= 1 << bit
    with pytest.raises(TamperError):
        vault().open(bytes(sealed), "file", 1, "p")


def test_a_file_that_lies_open_is_refused_where_all_are_sealed() -> None:
    with pytest.raises(TamperError, match="file: not sealed"):
        vault().open(b"open", "file", 1, "p")
    assert vault(strict=False).open(b"open", "file", 1, "p") == b"open"


def test_a_key_that_was_rotated_still_opens(tmp_path: Path) -> None:
    ring = Keyring(tmp_path / "keys")
    ring.make(["us", "us-2"])
    sealed = Vault.of(ring.load_all("us"), "job", strict=True).seal(TEXT, 1, "p")
    for year in (2026, 2027):
        ring.rotate("us", datetime(year, 1, 1, tzinfo=timezone.utc))
    assert len(ring.load_all("us")) == 3
    later = Vault.of(ring.load_all("us"), "job", strict=True)
    assert later.open(sealed, "file", 1, "p") == TEXT
    with pytest.raises(TamperError):
        Vault.of(ring.load_all("us")[:1], "job", strict=True).open(sealed, "file", 1, "p")
    assert Vault.of([ring.load("us")], "job", strict=True).open(later.seal(TEXT), "file") == TEXT
