"""What a region remembers, over restarts and torn writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xcloud.errors import SecurityError
from xcloud.secure.journal import Journal


def again(journal: Journal) -> Journal:
    journal.close()
    return Journal(journal.path)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "r0.journal")


def test_plans_only_go_forward(journal: Journal) -> None:
    journal.accept("job", 1, 3, 1)
    journal.accept("job", 1, 3, 2)
    journal = again(journal)
    for replayed in ((1, 3, 2), (1, 3, 1), (1, 2, 9)):
        with pytest.raises(SecurityError, match="a plan is not replayed"):
            journal.accept("job", *replayed)
    journal.accept("other job", 1, 1, 1)
    journal.accept("job", 2, 1, 1)  # a run that goes on from an earlier checkpoint
    assert (journal.last_start("job"), journal.last_start("other job"), journal.last_start("none")) == (
        2,
        1,
        0,
    )


def test_one_set_of_survivors_is_signed(journal: Journal) -> None:
    journal.agree(b"plan", b"a, b, c")
    journal.agree(b"plan", b"a, b, c")
    journal = again(journal)
    with pytest.raises(SecurityError, match="signed other survivors"):
        journal.agree(b"plan", b"a, b")
    journal.agree(b"next plan", b"a, b")


def test_shares_are_given_once_and_to_one_set(journal: Journal) -> None:
    journal.unmask("job", 1, b"plan", ["a", "b", "c"])
    journal = again(journal)
    with pytest.raises(SecurityError, match="given its shares for round 1 of 'job' already"):
        journal.unmask("job", 1, b"plan", ["a", "b", "c"])
    with pytest.raises(SecurityError, match=r"other survivors \(a, b, c\)"):
        journal.unmask("job", 1, b"another plan", ["a", "b"])
    journal.unmask("job", 1, b"another plan", ["a", "b", "c"])


def test_one_process_at_a_time(journal: Journal) -> None:
    with pytest.raises(SecurityError, match=r"r0.journal: another process"):
        Journal(journal.path)


def test_a_file_that_others_may_read_is_refused(journal: Journal) -> None:
    assert journal.path.stat().st_mode & 0o777 == 0o600
    journal.close()
    journal.path.chmod(0o640)
    with pytest.raises(SecurityError, match=r"mode 0640\); chmod 600 .*r0.journal"):
        Journal(journal.path)


def test_a_torn_write_loses_no_more_than_itself(journal: Journal) -> None:
    journal.accept("job", 1, 1, 1)
    whole = journal.path.read_bytes()
    journal.agree(b"plan", b"a")
    both = journal.path.read_bytes()
    for cut in range(len(whole), len(both)):
        journal.close()
        journal.path.write_bytes(both[:cut])
        journal = Journal(journal.path)
        assert journal.path.read_bytes() == whole
        assert journal.last_start("job") == 1
    journal.agree(b"plan", b"b")


def test_damage_in_the_middle_is_named(journal: Journal) -> None:
    for number in (1, 2, 3):
        journal.accept("job", 1, number, 1)
    journal.close()
    lines = journal.path.read_bytes().split(b"\n")
    lines[1] = lines[1][:-4]
    journal.path.write_bytes(b"\n".join(lines))
    with pytest.raises(SecurityError, match=r"r0.journal: line 2 is damaged"):
        Journal(journal.path)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(text=st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda t: (t + "\n").encode())))
def test_arbitrary_bytes_are_a_named_error_or_a_torn_line(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "fuzz.journal"
    path.touch(0o600)
    path.write_bytes(text)
    try:
        Journal(path).close()
    except SecurityError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome is right
