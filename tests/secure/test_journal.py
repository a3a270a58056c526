"""The journal: what was promised is still known after a crash at any byte, and nobody promises twice."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import damaged, quick
from xcloud.errors import JournalError, ReplayError, SecurityError
from xcloud.secure.journal import LINE_BYTES, Journal

Step = Callable[[Journal], None]


def h(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


STEPS: list[Step] = [
    lambda journal: journal.accept("job", 1, 1, h("plan 1")),
    lambda journal: journal.sign(h("plan 1"), h("all")),
    lambda journal: journal.unmask(h("plan 1")),
    lambda journal: journal.accept("job", 2, 1, h("plan 2")),
    lambda journal: journal.accept("job", 2, 2, h("plan 2b")),
    lambda journal: journal.sign(h("plan 2b"), h("some")),
    lambda journal: journal.accept("other", 1, 1, h("plan of another job")),
    lambda journal: journal.accept("job", 2, 1, h("plan 2, second sync"), sync=1),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "us.journal"


def test_a_round_is_remembered(path: Path) -> None:
    for step in STEPS:  # opened anew for each
        with Journal(path, "us") as journal:
            step(journal)
    with Journal(path, "us") as journal:
        assert journal.last("job") == (2, 2)
        assert journal.last("job", sync=1) == (2, 1)
        assert journal.last("other") == (1, 1)
        assert journal.last("third") is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


FORBIDDEN: list[tuple[Step, str]] = [
    (lambda journal: journal.accept("job", 2, 2, h("new")), "round 2, attempt 2 was accepted before"),
    (lambda journal: journal.accept("job", 2, 1, h("new")), "round 2, attempt 2 was accepted before"),
    (lambda journal: journal.accept("job", 1, 9, h("new")), "round 2, attempt 2 was accepted before"),
    (lambda journal: journal.accept("job", 3, 1, h("plan 1")), r"the plan .* was accepted before"),
    (lambda journal: journal.accept("third", 1, 1, h("plan 1")), r"the plan .* was accepted before"),
    (lambda journal: journal.sign(h("plan 1"), h("some")), "signs one set for each plan"),
    (lambda journal: journal.sign(h("never seen"), h("all")), "was never accepted"),
    (lambda journal: journal.unmask(h("never seen")), "was never accepted"),
    (lambda journal: journal.unmask(h("plan 2")), "no survivors were signed"),
]


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize(("step", "problem"), FORBIDDEN)
def test_nothing_is_promised_twice(path: Path, step: Step, problem: str, anew: bool) -> None:
    journal = Journal(path, "us")
    for earlier in STEPS:
        earlier(journal)
    if anew:
        journal.close()
        journal = Journal(path, "us")
    before = path.read_bytes()
    with journal, pytest.raises(ReplayError, match=f"^region us: .*{problem}"):
        step(journal)
    assert path.read_bytes() == before


def test_one_round_is_unmasked_under_one_plan(path: Path) -> None:
    """A retry with other survivors, after the first was unmasked, would isolate a region."""
    with Journal(path, "us") as journal:
        for attempt in (1, 2):
            journal.accept("job", 1, attempt, h(f"plan {attempt}"))
            journal.sign(h(f"plan {attempt}"), h("all"))
        journal.unmask(h("plan 2"))
        with pytest.raises(ReplayError, match="round 1 of 'job' was unmasked under another plan"):
            journal.unmask(h("plan 1"))


def test_the_same_answer_may_be_given_again(path: Path) -> None:
    with Journal(path, "us") as journal:
        for step in STEPS[:3]:
            step(journal)
    before = path.read_bytes()
    with Journal(path, "us") as journal:
        journal.sign(h("plan 1"), h("all"))
        journal.unmask(h("plan 1"))
    assert path.read_bytes() == before


def test_a_crash_at_any_byte_loses_only_what_was_not_promised(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: None
    )  # thousands of flushes, for a crash that is simulated
    ends = []
    with Journal(path, "us") as journal:
        for step in STEPS:
            ends.append(path.stat().st_size)
            step(journal)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in [*ends[1:], len(whole)])
        with Journal(path, "us") as journal:
            lines = path.read_bytes().splitlines(keepends=True)
            assert lines == whole.splitlines(keepends=True)[: kept + 1]
            for step in STEPS[kept:]:  # and it goes on from there
                step(journal)
        assert path.read_bytes() == whole


def test_what_was_returned_from_was_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    flush = os.fsync

    def recorded(descriptor: int) -> None:
        flush(descriptor)
        flushed.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", recorded)
    with Journal(path, "us") as journal:
        for step in STEPS:
            step(journal)
            assert flushed[-1] == path.stat().st_size


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_after_a_write_that_failed_it_must_be_read_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def failing(*arguments: object) -> int:
        if fails == "write":
            os.pwrite(path_descriptor, b"torn", path.stat().st_size)
        raise OSError("no space left")

    with Journal(path, "us") as journal:
        STEPS[0](journal)
        before = path.read_bytes()
        path_descriptor = os.open(path, os.O_WRONLY)
        monkeypatch.setattr(os, fails, failing)
        with pytest.raises(JournalError, match=r"us\.journal: cannot be written: no space left"):
            STEPS[1](journal)
        monkeypatch.undo()
        os.close(path_descriptor)
        with pytest.raises(JournalError, match="a write failed before"):
            STEPS[1](journal)
    with Journal(path, "us") as journal:
        assert path.read_bytes().startswith(before)
        journal.sign(h("plan 1"), h("all"))
    with Journal(path, "us") as journal, pytest.raises(ReplayError):
        journal.sign(h("plan 1"), h("some"))


def test_damage_anywhere_but_in_an_unfinished_line_is_an_error(path: Path) -> None:
    with Journal(path, "us") as journal:
        for step in STEPS:
            step(journal)
    whole = path.read_bytes()
    for place in range(len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(JournalError, match=r"us\.journal: line \d+ "):
            Journal(path, "us")


def test_lines_that_are_missing_twice_or_in_another_order_are_damage(path: Path) -> None:
    with Journal(path, "us") as journal:
        for step in STEPS:
            step(journal)
    lines = path.read_bytes().splitlines(keepends=True)
    for index in range(len(lines) - 1):
        for wrong in (
            lines[:index] + lines[index + 1 :],
            lines[: index + 1] + lines[index:],
            [*lines[:index], lines[index + 1], lines[index], *lines[index + 2 :]],
        ):
            path.write_bytes(b"".join(wrong))
            with pytest.raises(
                JournalError, match=rf"line {index + 1} is damaged|line {index + 2} is damaged"
            ):
                Journal(path, "us")


def test_a_journal_belongs_to_one_region(path: Path) -> None:
    Journal(path, "us").close()
    with pytest.raises(JournalError, match="the journal of region us; expected eu"):
        Journal(path, "eu")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_journal_that_others_can_use_is_refused(path: Path, mode: int) -> None:
    Journal(path, "us").close()
    path.chmod(mode)
    with pytest.raises(JournalError, match=rf"mode {mode:04o}.*chmod 600"):
        Journal(path, "us")


def test_two_processes_cannot_both_use_it(path: Path) -> None:
    script = f"""if True:
        import sys, pathlib
        from xcloud.errors import JournalError
        from xcloud.secure.journal import Journal
        try:
            Journal(pathlib.Path({str(path)!r}), "us")
        except JournalError as error:
            print(error)
            sys.exit(3)
    """

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    with Journal(path, "us"):
        refused = other()
        assert refused.returncode == 3, refused.stderr
        assert "in use by another process of region us" in refused.stdout
        with pytest.raises(JournalError, match="in use by another process"):
            Journal(path, "us")
    assert other().returncode == 0


def test_a_process_that_is_killed_gives_the_lock_back(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(path, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(JournalError, match="in use"):
        Journal(path, "us")
    process.kill()
    process.join()
    with Journal(path, "us") as journal:
        assert journal.last("job") == (1, 1)


def _hold(path: Path, ready: object) -> None:
    journal = Journal(path, "us")
    STEPS[0](journal)
    ready.set()  # type: ignore[attr-defined]
    time.sleep(600)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, problem in (
        ("pipe", "not a regular file"),
        ("none/us", "cannot be opened"),
        (".", "cannot be opened"),
    ):
        with pytest.raises(JournalError, match=problem):
            Journal(tmp_path / name, "us")


def test_a_line_without_end_is_not_read_into_memory(path: Path) -> None:
    Journal(path, "us").close()
    with path.open("ab") as file:
        file.truncate(1 << 40)  # a sparse terabyte
    with pytest.raises(JournalError, match=f"line 2 is longer than {LINE_BYTES} bytes"):
        Journal(path, "us")


@pytest.mark.parametrize(("round", "plan"), [(-1, bytes(32)), (1 << 63, bytes(32)), (1, b""), (1, bytes(33))])
def test_what_is_no_plan_is_not_written(path: Path, round: int, plan: bytes) -> None:
    with Journal(path, "us") as journal:
        before = path.read_bytes()
        with pytest.raises(JournalError, match=r"us\.journal: (round|plan): "):
            journal.accept("job", round, 1, plan)
        assert path.read_bytes() == before
        journal.accept("job", 1, 1, bytes(32))


def test_a_closed_journal_promises_nothing(path: Path) -> None:
    journal = Journal(path, "us")
    journal.close()
    journal.close()
    with pytest.raises(JournalError, match="closed"):
        STEPS[0](journal)


def chained(*bodies: bytes) -> bytes:
    """Lines with checksums that fit, as somebody with the file could write them."""
    found, out = b"", b""
    for body in bodies:
        found = hashlib.sha256(found + b" " + body).hexdigest()[:32].encode()
        out += found + b" " + body + b"\n"
    return out


BEGUN = b'{"event":{"kind":"begun","version":1,"region":"us"}}'
UNMASKED = b'{"event":{"kind":"unmasked","plan":"%s"}}' % (b"0" * 64)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([UNMASKED], "line 1: expected the beginning"),
        ([BEGUN, BEGUN], "line 2: expected no beginning"),
        ([BEGUN, UNMASKED], "line 2 contradicts an earlier one: .*never accepted"),
        ([BEGUN.replace(b":1,", b":2,")], r"line 1: event\.begun\.version"),
        ([BEGUN, b"{}"], "line 2: event: "),
        ([BEGUN, b"\xff"], "line 2: not valid JSON"),
    ],
)
def test_lines_that_make_no_sense_are_refused(path: Path, lines: list[bytes], problem: str) -> None:
    path.write_bytes(chained(*lines))
    path.chmod(0o600)
    with pytest.raises(JournalError, match=rf"us\.journal: {problem}"):
        Journal(path, "us")


@given(
    data=st.binary(max_size=200)
    | st.lists(st.binary(max_size=40) | damaged(BEGUN) | damaged(UNMASKED)).map(
        lambda lines: chained(BEGUN, *lines)
    )
)
@quick
def test_no_bytes_raise_anything_but_the_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("journal") / "us.journal"
    path.write_bytes(data)
    path.chmod(0o600)
    with contextlib.suppress(JournalError), Journal(path, "us") as journal:
        with contextlib.suppress(SecurityError):
            journal.accept("job", 1, 1, bytes(32))
        assert journal.last("job") is not None
