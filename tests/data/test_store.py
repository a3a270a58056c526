import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xcloud
from xcloud.data import BytesTokenizer, Document, prepare_store
from xcloud.errors import ConfigError, DataError

EOS = BytesTokenizer.eos_id


class Texts:
    """Documents in memory that count how often they are read."""

    def __init__(self, texts):
        self.texts = texts
        self.reads = 0

    def documents(self):
        self.reads += 1
        for name, text in self.texts.items():
            yield Document(name, text)

    def describe(self):
        return f"{len(self.texts)} texts"

    def fingerprint(self):
        return json.dumps(self.texts)


class WideTokenizer(BytesTokenizer):
    """Ids that do not fit 16 bits."""

    vocab_size = 70_000

    def encode(self, text):
        return super().encode(text) + np.uint32(69_000)

    def fingerprint(self):
        return "wide"


def numbered(count, size=40):
    return Texts({f"doc{i}": f"{i} " * size for i in range(count)})


def prepare(tmp_path, *sources, length=16, fraction=0.2, tokenizer=None, progress=None):
    return prepare_store(
        sources,
        tokenizer or BytesTokenizer(),
        sequence_length=length,
        held_out_fraction=fraction,
        cache_dir=tmp_path / "cache",
        progress=progress,
    )


def flat(split):
    """All whole sequences of a split as one list."""
    return split.read(np.arange(len(split))).ravel().tolist()


def documents_in(split):
    """The whole documents in a split, as texts."""
    text = BytesTokenizer()
    tokens = np.array(flat(split))
    pieces = np.split(tokens, np.flatnonzero(tokens == EOS) + 1)[:-1]
    return [text.decode(piece) for piece in pieces]


def joined(texts):
    return [token for text in texts for token in [*text.encode(), EOS]]


def is_held_out(name, fraction):
    """The documented rule, written a second time: changing it would move documents between splits."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") / 2**64 < fraction


def entry_of(tmp_path):
    (entry,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    return entry


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(max_size=60), min_size=1, max_size=30),
    length=st.integers(1, 20),
    fraction=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_packing_is_the_joined_documents_cut(tmp_path_factory, texts, length, fraction):
    source = Texts({str(i): text for i, text in enumerate(texts)})
    everything = joined(text for text in texts if text)
    needed = length * (2 if fraction else 1)
    folder = tmp_path_factory.mktemp("pack")
    if len(everything) < needed:
        with pytest.raises(DataError, match=rf"{len(everything)} tokens, but at least {needed} "):
            prepare(folder, source, length=length, fraction=fraction)
        return
    store = prepare(folder, source, length=length, fraction=fraction)
    assert store.tokens == len(everything) == store.train.tokens + store.held_out.tokens
    assert store.documents == sum(map(bool, texts))
    assert len(store.train) >= 1
    assert (len(store.held_out) >= 1) == (fraction > 0)
    packed = np.fromfile(entry_of(folder) / "tokens.bin", dtype="<u2").tolist()
    kept = [text for name, text in source.texts.items() if text and not is_held_out(name, fraction)]
    held = [text for name, text in source.texts.items() if text and is_held_out(name, fraction)]
    assert packed == joined(kept) + joined(held)
    if not store.cut_by_position:
        assert store.train.tokens == len(joined(kept))
    # The sequences of both splits are prefixes of their stretches of that file.
    assert flat(store.train) == packed[: len(store.train) * length]
    held_out = packed[store.train.tokens :]
    assert flat(store.held_out) == held_out[: len(store.held_out) * length]


def test_no_held_out_document_is_in_train(tmp_path):
    source = numbered(200)
    store = prepare(tmp_path, source, length=1)
    train, held_out = documents_in(store.train), documents_in(store.held_out)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(source.texts.values())
    assert 20 < len(held_out) < 60
    assert "200 documents" in store.describe()
    assert "by document" in store.describe()


def test_held_out_does_not_change_when_documents_come_and_go(tmp_path):
    many = numbered(200)
    fewer = Texts({name: text for name, text in many.texts.items() if int(name[3:]) % 3})
    wide, narrow = (prepare(tmp_path, source, length=1) for source in (many, fewer))
    kept = set(fewer.texts.values())
    assert set(documents_in(narrow.held_out)) == set(documents_in(wide.held_out)) & kept


def test_one_document_is_cut_by_position(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    for name in ("a", "b", "c", "d", "e", "f", "g", "h"):  # held out or not by its id
        store = prepare(tmp_path, Texts({name: text}), length=10, fraction=0.2)
        assert store.cut_by_position
        assert store.train.tokens + store.held_out.tokens == 1001
        assert len(store.held_out) == 20
        both = joined([text])
        assert flat(store.train) == both[:800]
        assert flat(store.held_out) == both[801:]
        assert "by position" in store.describe()


def test_a_cut_prefers_document_borders(tmp_path):
    texts = Texts({"long": "l" * 899, "short": "s" * 99})
    fractions = [prepare(tmp_path, texts, length=10, fraction=f) for f in (0.09, 0.1, 0.11)]
    for store in fractions:
        if store.cut_by_position:
            assert {*documents_in(store.train), *documents_in(store.held_out)} == set(texts.texts.values())
    assert any(store.cut_by_position for store in fractions)


def test_largest_document_is_never_left_held_out_alone(tmp_path):
    for number in range(40):
        texts = Texts({f"big{number}": "b" * 2000, f"small{number}": "s" * 200})
        store = prepare(tmp_path, texts, length=10, fraction=0.1)
        assert store.held_out.tokens <= store.train.tokens


def test_no_text_is_an_error_that_counts(tmp_path):
    with pytest.raises(DataError, match=r"1 texts: 0 documents with 0 tokens, but at least 32 are needed"):
        prepare(tmp_path, Texts({"a": ""}))
    with pytest.raises(DataError, match="no data source"):
        prepare(tmp_path)


def test_zero_fraction_holds_nothing_out(tmp_path):
    store = prepare(tmp_path, numbered(10), fraction=0)
    assert len(store.held_out) == 0
    assert store.held_out.read(np.empty(0, np.int64)).shape == (0, 16)


@pytest.mark.parametrize("bad", [{"length": 0}, {"fraction": -0.1}, {"fraction": 0.6}])
def test_settings_out_of_range_are_refused(tmp_path, bad):
    with pytest.raises(ConfigError):
        prepare(tmp_path, numbered(10), **bad)


def test_read_gives_rows_in_the_order_asked(tmp_path):
    store = prepare(tmp_path, numbered(50))
    rows = store.train.read(np.array([3, 0, 3]))
    assert rows.dtype == np.int64
    assert rows.shape == (3, 16)
    assert rows[0].tolist() == rows[2].tolist() == flat(store.train)[48:64]
    for bad in (-1, len(store.train)):
        with pytest.raises(IndexError, match=str(bad)):
            store.train.read(np.array([bad]))


def test_store_pickles_small_and_reads_after(tmp_path):
    store = prepare(tmp_path, numbered(2000))
    expected = flat(store.train)
    data = pickle.dumps(store)
    assert len(data) < 2000
    assert flat(pickle.loads(data).train) == expected  # noqa: S301 - written two lines above


def test_large_vocabulary_takes_32_bits(tmp_path):
    store = prepare(tmp_path, Texts({"a": "x" * 100}), tokenizer=WideTokenizer())
    assert flat(store.train)[:3] == [69_000 + ord("x")] * 3
    assert (entry_of(tmp_path) / "tokens.bin").stat().st_size == 4 * store.tokens


def test_sources_are_joined_in_order(tmp_path):
    store = prepare(tmp_path, Texts({"a": "first"}), Texts({"b": "second"}), length=1, fraction=0)
    assert documents_in(store.train) == ["first", "second"]


# --- cache


def test_second_call_does_not_read_the_source(tmp_path):
    source, seen = numbered(50), []
    first = prepare(tmp_path, source, progress=seen.append)
    assert seen == [first.tokens]
    second = prepare(tmp_path, source, progress=seen.append)
    other_length = prepare(tmp_path, source, length=8)
    assert source.reads == 1
    assert len(seen) == 1
    assert second.fingerprint == first.fingerprint
    assert flat(second.train) == flat(first.train)
    assert other_length.fingerprint != first.fingerprint
    assert other_length.describe().replace(" of 8)", "") != first.describe()


def test_progress_grows(tmp_path):
    seen = []
    store = prepare(tmp_path, numbered(30, size=100_000), progress=seen.append)
    assert seen == sorted(set(seen))
    assert len(seen) > 3
    assert seen[-1] == store.tokens


def test_other_settings_or_documents_are_packed_anew(tmp_path):
    stores = [
        prepare(tmp_path, numbered(50)),
        prepare(tmp_path, numbered(51)),
        prepare(tmp_path, numbered(50), fraction=0.3),
        prepare(tmp_path, numbered(50), tokenizer=WideTokenizer()),
    ]
    assert len({store.fingerprint for store in stores}) == 4


def test_fingerprint_does_not_depend_on_the_machine(tmp_path):
    class Elsewhere(Texts):
        def fingerprint(self):
            return "other file times"

    here, there = numbered(50), Elsewhere(numbered(50).texts)
    assert prepare(tmp_path / "a", here).fingerprint == prepare(tmp_path / "b", there).fingerprint


@pytest.mark.parametrize("damage", ["short", "no tokens", "no meta", "bad meta", "old version", "bad dtype"])
def test_damaged_cache_is_rebuilt(tmp_path, damage):
    source = numbered(50)
    before = prepare(tmp_path, source)
    expected = flat(before.train)
    tokens, meta = entry_of(tmp_path) / "tokens.bin", entry_of(tmp_path) / "store.json"
    if damage == "short":
        tokens.write_bytes(tokens.read_bytes()[:-2])
    elif damage == "no tokens":
        tokens.unlink()
    elif damage == "no meta":
        meta.unlink()
    elif damage == "bad meta":
        meta.write_text("{")
    else:
        change = {"version": 0} if damage == "old version" else {"dtype": "nonsense"}
        meta.write_text(json.dumps({**json.loads(meta.read_text()), **change}))
    after = prepare(tmp_path, source)
    assert source.reads == 2
    assert flat(after.train) == expected
    assert after.fingerprint == before.fingerprint


def test_failed_preparation_leaves_nothing_behind(tmp_path):
    class Failing(Texts):
        def documents(self):
            yield Document("a", "some text")
            if not self.reads:
                self.reads += 1
                raise DataError("line 2 is bad")
            yield Document("b", "more text" * 20)

    source = Failing({})
    with pytest.raises(DataError, match="line 2"):
        prepare(tmp_path, source)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    leftover = next((tmp_path / "cache").iterdir()).with_suffix(".tmp")
    leftover.mkdir()  # as a killed process leaves it
    (leftover / "tokens.bin").write_bytes(b"half")
    assert prepare(tmp_path, source).documents == 2


def test_two_processes_prepare_once(tmp_path):
    for i in range(300):
        (tmp_path / f"{i:03}.txt").write_text(f"{i} " * 2000)
    code = f"""
from pathlib import Path
from xcloud.data import SOURCES, TOKENIZERS, prepare_store
seen = []
store = prepare_store(
    [SOURCES.parse({{"type": "text", "paths": {str(tmp_path)!r}}}).build()],
    TOKENIZERS.parse("bytes").build(),
    sequence_length=64,
    held_out_fraction=0.1,
    cache_dir=Path({str(tmp_path / "cache")!r}),
    progress=seen.append,
)
print(store.fingerprint, store.train.read([len(store.train) - 1]).sum(), bool(seen))
"""
    root = Path(xcloud.__path__[0]).parent
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [process.communicate(timeout=60)[0].split() for process in running]
    assert lines[0][:2] == lines[1][:2]
    assert sorted(line[2] for line in lines) == ["False", "True"]
