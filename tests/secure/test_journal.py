"""The journal: what was promised is still known after a crash at any byte, and nobody promises twice."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
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
    lambda journal: journal.accept("job", 1, 1, 1),
    lambda journal: journal.agree(h("plan 1"), b"a, b, c"),
    lambda journal: journal.unmask("job", 1, h("plan 1"), ["a", "b", "c"]),
    lambda journal: journal.accept("job", 1, 2, 1),
    lambda journal: journal.accept("job", 1, 2, 2),
    lambda journal: journal.agree(h("plan 2"), b"a, b"),
    lambda journal: journal.accept("other", 5, 1, 1),
    lambda journal: journal.accept("job", 2, 1, 1),  # goes on from an earlier checkpoint
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "us.journal"


def test_a_round_is_remembered(path: Path) -> None:
    for step in STEPS:  # opened anew for each
        with Journal(path, "us") as journal:
            step(journal)
    with Journal(path, "us") as journal:
        assert [journal.last_start(job) for job in ("job", "other", "third")] == [2, 5, 0]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_threads_cannot_both_be_the_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A region answers in several threads; signatures on two sets of survivors would open both secrets of a region."""
    flush, signed, refused = os.fsync, [], []

    def slow(file: int) -> None:
        time.sleep(0.05)
        flush(file)

    with Journal(path, "us") as journal:
        monkeypatch.setattr(os, "fsync", slow)

        def agree(survivors: bytes) -> None:
            try:
                journal.agree(h("plan 1"), survivors)
                signed.append(survivors)
            except ReplayError:
                refused.append(survivors)

        threads = [threading.Thread(target=agree, args=(names,)) for names in (b"a, b", b"a, c", b"b, c")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(signed), len(refused)) == (1, 2)
    Journal(path, "us").close()  # and no line contradicts another


FORBIDDEN: list[tuple[Step, str]] = [
    (lambda journal: journal.accept("job", 2, 1, 1), "a plan is not replayed"),
    (
        lambda journal: journal.accept("job", 1, 9, 9),
        "before round 1, attempt 1 of start 2 .*a plan is not replayed",
    ),
    (lambda journal: journal.accept("other", 5, 1, 1), "a plan is not replayed"),
    (
        lambda journal: journal.agree(h("plan 1"), b"a, b"),
        "it has signed other survivors for this plan before",
    ),
    (lambda journal: journal.agree(h("plan 2"), b"a"), "it has signed other survivors for this plan before"),
    (
        lambda journal: journal.unmask("job", 1, h("plan 1"), ["a", "b", "c"]),
        "it has given its shares for round 1 of 'job' already",
    ),
    (
        lambda journal: journal.unmask("job", 1, h("plan 1b"), ["a", "b"]),
        r"to other survivors \(a, b, c\); the difference of the two sums would be somebody's update",
    ),
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
    with journal, pytest.raises(ReplayError, match=problem):
        step(journal)
    assert path.read_bytes() == before


def test_a_round_that_is_played_again_is_opened_for_the_same_survivors(path: Path) -> None:
    with Journal(path, "us") as journal:
        for step in STEPS:
            step(journal)
        journal.unmask("job", 1, h("plan 1 of start 2"), ["a", "b", "c"])
        journal.unmask("other", 1, h("other plan"), ["a", "b"])


def test_the_same_signature_may_be_given_again(path: Path) -> None:
    with Journal(path, "us") as journal:
        STEPS[1](journal)
    before = path.read_bytes()
    with Journal(path, "us") as journal:
        STEPS[1](journal)
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
        journal.agree(h("plan 1"), b"a, b, c")
    with Journal(path, "us") as journal, pytest.raises(ReplayError):
        journal.agree(h("plan 1"), b"a")


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
        assert "another process of region us has it open" in refused.stdout
        with pytest.raises(JournalError, match="another process"):
            Journal(path, "us")
    assert other().returncode == 0


def test_a_process_that_is_killed_gives_the_lock_back(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(path, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(JournalError, match="another process"):
        Journal(path, "us")
    process.kill()
    process.join()
    with Journal(path, "us") as journal:
        assert journal.last_start("job") == 1


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


@pytest.mark.parametrize(
    ("step", "field"),
    [
        (lambda journal: journal.accept("job", 1, -1, 1), "round"),
        (lambda journal: journal.accept("job", 1, 1 << 63, 1), "round"),
        (lambda journal: journal.accept("", 1, 1, 1), "job"),
        (lambda journal: journal.agree(b"", b""), "plan"),
        (lambda journal: journal.unmask("job", 1, bytes(32), [""]), r"names\.0"),
        (lambda journal: journal.unmask("job", 1, bytes(32), ["a"] * 5000), "names"),
        (lambda journal: journal.unmask("job", 1, bytes(32), ["\0" * 256] * 4096), "an entry of"),
    ],
)
def test_what_is_no_plan_is_not_written(path: Path, step: Step, field: str) -> None:
    with Journal(path, "us") as journal:
        before = path.read_bytes()
        with pytest.raises(JournalError, match=rf"us\.journal: {field}"):
            step(journal)
        assert path.read_bytes() == before
        STEPS[0](journal)


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


BEGIN = b'{"entry":{"kind":"begin","version":1,"region":"us"}}'
AGREE = b'{"entry":{"kind":"agree","plan":"%s","survivors":"00"}}' % (b"0" * 64)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([AGREE], "line 1: expected the beginning"),
        ([BEGIN, BEGIN], "line 2: expected no beginning"),
        (
            [BEGIN, AGREE, AGREE.replace(b'"00"', b'"01"')],
            "line 3 contradicts an earlier one: .*signed other",
        ),
        ([BEGIN.replace(b":1,", b":2,")], r"line 1: entry\.begin\.version"),
        ([BEGIN, b"{}"], "line 2: entry: "),
        ([BEGIN, b"\xff"], "line 2: not valid JSON"),
    ],
)
def test_lines_that_make_no_sense_are_refused(path: Path, lines: list[bytes], problem: str) -> None:
    path.write_bytes(chained(*lines))
    path.chmod(0o600)
    with pytest.raises(JournalError, match=rf"us\.journal: {problem}"):
        Journal(path, "us")


@given(
    data=st.binary(max_size=200)
    | st.lists(st.binary(max_size=40) | damaged(BEGIN) | damaged(AGREE)).map(
        lambda lines: chained(BEGIN, *lines)
    )
)
@quick
def test_no_bytes_raise_anything_but_the_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("journal") / "us.journal"
    path.write_bytes(data)
    path.chmod(0o600)
    with contextlib.suppress(JournalError), Journal(path, "us") as journal:
        with contextlib.suppress(SecurityError):
            journal.accept("job", 1, 1, 1)
        assert journal.last_start("job") >= 1
