"""Checkpoints in a folder and at an fsspec URL: whole or not at all, checked when read, by chunk."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import safetensors.numpy

import xcloud.checkpoint
from tests.strategies import Array
from xcloud.checkpoint import CheckpointStore, CommitRecord, RegionState, chunk_files
from xcloud.errors import CheckpointError, TamperError
from xcloud.manifest import Manifest
from xcloud.messages import CheckpointFile
from xcloud.secure.vault import Vault

LAYOUT = Manifest.of([("weight", (40, 25)), ("bias", (13,))], 100)
CHUNKS = range(LAYOUT.chunk_count)
assert len(CHUNKS) == 11


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CheckpointStore]:
    """An empty store of each kind."""
    url = str(tmp_path / "run") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/run"
    found = CheckpointStore(url)
    yield found
    if found.fs.exists(found.root):
        found.fs.rm(found.root, recursive=True)


def flat(name: str, round: int = 1) -> Array:
    """A whole flat vector, other values for each name and round."""
    return (
        np.random.default_rng([len(name), ord(name[0]), round])
        .standard_normal(LAYOUT.size)
        .astype(np.float32)
    )


def by_chunk(values: Array, chunks: Iterable[int]) -> dict[int, Array]:
    return {c: values[c * 100 : c * 100 + LAYOUT.chunk_length(c)] for c in chunks}


def write(
    store: CheckpointStore,
    round: int = 1,
    prefix: str = "model/",
    names: Sequence[str] = ("anchor", "momentum"),
    world: int = 1,
    scalars: dict[str, Any] | None = None,
) -> list[CheckpointFile]:
    """The files that `world` ranks write together."""
    written = []
    for rank in range(world):
        (owned,) = LAYOUT.owned(rank, world)
        tensors = {name: by_chunk(flat(name, round), owned) for name in names}
        written += store.write_tensors(round, prefix, owned, tensors, scalars or {})
    return written


def read(
    store: CheckpointStore,
    files: Iterable[CheckpointFile],
    round: int = 1,
    prefix: str = "model/",
    world: int = 1,
) -> dict[str, Array]:
    """The flat vectors that `world` ranks read together."""
    parts: dict[str, list[Array]] = {}
    files = list(files)
    for rank in range(world):
        (owned,) = LAYOUT.owned(rank, world)
        tensors, _ = store.read_tensors(round, chunk_files(files, prefix), owned)
        for name, values in tensors.items():
            assert sorted(values) == list(owned)
            parts.setdefault(name, []).extend(values[c] for c in owned)
    return {name: np.concatenate(values) for name, values in parts.items()}


def test_a_sealed_file_opens_with_its_vault_alone_and_may_be_carried_on(tmp_path: Path) -> None:
    store, vault = CheckpointStore(tmp_path), Vault("us", [b"k" * 32], strict=True)
    tensors = {"moments": by_chunk(flat("moments", 3), range(3))}
    files = store.write_tensors(3, "regions/us/", range(3), tensors, {"step": 4.0}, vault)
    store.carry(3, 5, files)
    parts = chunk_files(files, "regions/us/")
    found, scalars = store.read_tensors(5, parts, range(3), vault, sealed_in=3)
    assert scalars == {"step": 4.0}
    assert all(np.array_equal(found["moments"][c], values) for c, values in tensors["moments"].items())
    with pytest.raises(TamperError, match="does not open with the key of region 'us'"):
        store.read_tensors(5, parts, range(3), vault)  # put in the place of what was saved in round 5
    with pytest.raises(CheckpointError, match="sealed with its region's key"):
        store.read_tensors(3, parts, range(3))
    raw = (tmp_path / "round-000003" / files[0].path).read_bytes()
    assert tensors["moments"][0][:8].tobytes() not in raw


def record(round: int, model: Iterable[CheckpointFile], **regions: RegionState) -> CommitRecord:
    return CommitRecord(
        job="demo",
        round=round,
        manifest_digest=LAYOUT.digest,
        model_digest="d" * 32,
        regions=regions,
        model_files=tuple(model),
        chunk_size=100,
        tokens=1000 * round,
        eval_loss_start=5.5,
        eval_loss=5.0 / round,
    )


def commit(store: CheckpointStore, round: int) -> CommitRecord:
    """One whole checkpoint: a model and one region's inner state."""
    state = write(store, round, "regions/a/pool-0-", ("exp_avg",))
    whole = record(
        round, write(store, round), a=RegionState(cursor=7 * round, inner_round=round, files=tuple(state))
    )
    store.commit(whole)
    return whole


# -- there and back -----------------------------------------------------------------------


def test_write_commit_and_read_back(store: CheckpointStore) -> None:
    whole = commit(store, 12)
    assert store.rounds() == [12]
    again = CheckpointStore(store.url)  # another process
    assert again.record(12) == whole == again.latest()
    model = read(again, whole.model_files, 12)
    assert {name: v.tobytes() for name, v in model.items()} == {
        name: flat(name, 12).tobytes() for name in ("anchor", "momentum")
    }
    inner = read(again, whole.regions["a"].files, 12, "regions/a/pool-0-")
    assert inner["exp_avg"].tobytes() == flat("exp_avg", 12).tobytes()


def test_where_things_lie(store: CheckpointStore) -> None:
    whole = commit(store, 12)
    assert store.folder(12).endswith("/run/round-000012")
    found = sorted(path.partition("round-000012/")[2] for path in store.fs.find(store.folder(12)))
    assert found == sorted(
        [
            "commit.json",
            "model/chunks-000000-000010.safetensors",
            "regions/a/pool-0-chunks-000000-000010.safetensors",
        ]
    )
    assert {f.path for f in whole.model_files} <= set(found)
    for file in whole.model_files:
        data = store.fs.cat_file(f"{store.folder(12)}/{file.path}")
        assert len(data) == file.size
        assert set(safetensors.numpy.load(data)) == {
            f"{n}.{c:06d}" for n in ("anchor", "momentum") for c in CHUNKS
        }


def test_values_that_are_not_finite_are_kept_bit_for_bit(store: CheckpointStore) -> None:
    odd = np.array([np.nan, np.inf, -0.0, 1e-45], np.float32)
    files = store.write_tensors(1, "model/", range(1), {"anchor": {0: odd}}, {})
    tensors, _ = store.read_tensors(1, chunk_files(files, "model/"), range(1))
    assert tensors["anchor"][0].tobytes() == odd.tobytes()


def test_scalars_come_back_to_every_reader(store: CheckpointStore) -> None:
    scalars = {"step": 41.0, "loss_scale": {"cur_scale": 65536.0, "cur_iter": 3}, "nothing": None}
    files = write(store, world=3, scalars=scalars)
    for rank in range(4):
        _, found = store.read_tensors(1, chunk_files(files, "model/"), LAYOUT.owned(rank, 4)[0])
        assert found == scalars


def test_a_rank_that_owns_nothing_writes_and_reads_nothing(store: CheckpointStore) -> None:
    assert store.write_tensors(1, "model/", range(3, 3), {"anchor": {}}, {}) == []
    files = write(store)
    assert store.read_tensors(1, chunk_files(files, "model/"), range(3, 3)) == ({}, {})


def test_losses_that_do_not_exist(store: CheckpointStore) -> None:
    whole = record(1, write(store)).model_copy(update={"eval_loss": None, "eval_loss_start": math.nan})
    store.commit(whole)
    found = store.record(1)
    assert found.eval_loss is None
    assert found.eval_loss_start is not None
    assert math.isnan(found.eval_loss_start)


# -- chunks and ranks ---------------------------------------------------------------------


@pytest.mark.parametrize("file_bytes", [1, 1000, 1700, 1 << 20])
@pytest.mark.parametrize("readers", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("writers", [1, 2, 3])
def test_any_number_of_ranks_reads_what_any_number_wrote(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, writers: int, readers: int, file_bytes: int
) -> None:
    """Two ranks under ZeRO-2 write, one under ZeRO-3 reads, from files that were cut anywhere."""
    monkeypatch.setattr(xcloud.checkpoint, "FILE_BYTES", file_bytes)
    files = write(store, world=writers)
    found = read(store, files, world=readers)
    assert {name: v.tobytes() for name, v in found.items()} == {
        name: flat(name).tobytes() for name in ("anchor", "momentum")
    }


def test_large_shards_are_cut_into_files(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xcloud.checkpoint, "FILE_BYTES", 3 * 800)  # a chunk of two tensors takes 800 bytes
    files = chunk_files(write(store, world=2), "model/")
    assert [(f.first, f.last) for f in files] == [(0, 2), (3, 4), (5, 7), (8, 10)]
    assert all(f.file.size < 3 * 800 + 1000 for f in files)  # and a header
    for part in files:
        held = safetensors.numpy.load(store.fs.cat_file(f"{store.folder(1)}/{part.file.path}"))
        assert {int(key.rpartition(".")[2]) for key in held} == set(range(part.first, part.last + 1))


def test_only_the_files_that_are_needed_are_read(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xcloud.checkpoint, "FILE_BYTES", 1)
    files = chunk_files(write(store), "model/")
    for part in files:
        if part.first not in (4, 5):
            store.fs.rm(f"{store.folder(1)}/{part.file.path}")
    tensors, _ = store.read_tensors(1, files, range(4, 6))
    assert tensors["anchor"][5].tobytes() == by_chunk(flat("anchor"), [5])[5].tobytes()


def test_a_chunk_that_no_file_holds(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partly covered or not at all: never silently less than was asked for."""
    monkeypatch.setattr(xcloud.checkpoint, "FILE_BYTES", 3 * 800)
    files = chunk_files(write(store), "model/")
    with pytest.raises(CheckpointError, match="chunk 3"):
        store.read_tensors(1, [f for f in files if f.first != 3], CHUNKS)
    with pytest.raises(CheckpointError, match="chunk 3"):
        store.read_tensors(1, [f for f in files if f.first != 3], range(3, 5))


def test_chunk_files_picks_and_orders() -> None:
    def file(path: str) -> CheckpointFile:
        return CheckpointFile(path=path, size=1, digest="")

    paths = [
        "regions/a/pool-1-chunks-000000-000010.safetensors",
        "regions/a/pool-0-chunks-000010-000019.safetensors",
        "regions/a/pool-0-chunks-000002-000009.safetensors",
        "regions/ab/pool-0-chunks-000000-000001.safetensors",
        "regions/a/pool-0-chunks-1000000-1000001.safetensors",
        "model/chunks-000000-000010.safetensors",
        "model/chunks-000000-000010.safetensors.tmp",
    ]
    found = chunk_files(map(file, paths), "regions/a/pool-0-")
    assert [(f.first, f.last) for f in found] == [(2, 9), (10, 19), (1_000_000, 1_000_001)]
    assert [f.file.path for f in chunk_files(map(file, paths), "model/")] == [paths[5]]
    assert chunk_files(map(file, paths), "regions/./pool-0-") == []


# -- whole or not at all ------------------------------------------------------------------


def test_without_a_commit_there_is_no_round(store: CheckpointStore) -> None:
    assert store.rounds() == []
    assert store.latest() is None
    write(store, 1)
    assert store.rounds() == []
    assert store.latest() is None
    with pytest.raises(CheckpointError, match="round 1 has no checkpoint; committed rounds: none"):
        store.record(1)


def test_an_interrupted_round_leaves_the_one_before(store: CheckpointStore) -> None:
    whole = commit(store, 1)
    write(store, 2)
    store.fs.pipe_file(f"{store.folder(2)}/commit.json.tmp", b"{")
    assert store.rounds() == [1]
    assert store.latest() == whole
    store.clear(2)
    assert not store.fs.exists(store.folder(2))
    store.clear(2)
    assert store.latest() == whole


@pytest.mark.parametrize("short", [False, True], ids=["missing", "short"])
def test_commit_refuses_what_is_not_there_in_full(store: CheckpointStore, short: bool) -> None:
    """The usual cause is a folder that the regions' nodes do not share with the driver's."""
    for place in ("model/", "regions/a/pool-0-"):
        model, state = write(store), write(store, 1, "regions/a/pool-0-")
        path = f"{store.folder(1)}/{place}chunks-000000-000010.safetensors"
        data = store.fs.cat_file(path)
        store.fs.rm(path)
        if short:
            store.fs.pipe_file(path, data[:-1])
        whole = record(1, model, a=RegionState(cursor=1, inner_round=1, files=tuple(state)))
        found = str(len(data) - 1) if short else "no file"
        with pytest.raises(CheckpointError, match=f"{path}: expected {len(data)} bytes, found {found}"):
            store.commit(whole)
        assert store.rounds() == []
        store.clear(1)


def test_committing_again_replaces_the_record(store: CheckpointStore) -> None:
    files = write(store)
    store.commit(record(1, files))
    store.commit(record(1, files).model_copy(update={"tokens": 5}))
    assert store.record(1).tokens == 5
    assert [p for p in store.fs.find(store.folder(1)) if p.endswith(".tmp")] == []


def test_an_unknown_round_lists_the_known_ones(store: CheckpointStore) -> None:
    commit(store, 3)
    commit(store, 12)
    with pytest.raises(CheckpointError, match="round 4 has no checkpoint; committed rounds: 3, 12"):
        store.record(4)


def test_other_folders_are_no_rounds(store: CheckpointStore) -> None:
    commit(store, 3)
    for name in ("round-x", "round-000004.bak", "xround-000005", "round-000006"):
        store.fs.makedirs(f"{store.root}/{name}", exist_ok=True)
        store.fs.pipe_file(f"{store.root}/{name}/{'other' if name.endswith('6') else 'commit'}.json", b"{}")
    store.fs.pipe_file(f"{store.root}/round-000007", b"")
    assert store.rounds() == [3]


def test_rounds_are_in_order_also_beyond_six_digits(store: CheckpointStore) -> None:
    for round in (1_000_000, 9, 10):
        commit(store, round)
    assert store.rounds() == [9, 10, 1_000_000]
    latest = store.latest()
    assert latest is not None
    assert latest.round == 1_000_000


# -- retention ----------------------------------------------------------------------------


def test_prune_keeps_the_newest(store: CheckpointStore) -> None:
    for round in (1, 2, 3, 5):
        commit(store, round)
    write(store, 6)  # being written
    assert store.prune(2) == [1, 2]
    assert store.rounds() == [3, 5]
    assert [store.fs.exists(store.folder(r)) for r in (1, 2, 3, 5, 6)] == [False, False, True, True, True]
    assert store.prune(2) == []
    whole = store.record(3)
    assert read(store, whole.model_files, 3)["anchor"].tobytes() == flat("anchor", 3).tobytes()


def test_a_pruned_round_is_gone_before_its_files_are(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it deletes: what is left is no round, rather than a damaged one."""
    commit(store, 1)
    commit(store, 2)
    remove = store.fs.rm

    def interrupted(path: str, recursive: bool = False, **rest: Any) -> None:
        if recursive:
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(store.fs, "rm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.prune(1)
    assert store.rounds() == [2]


def test_carry_makes_a_checkpoint_stand_alone(store: CheckpointStore) -> None:
    """A region that was away: its state of an older round is copied, so that the older one can go."""
    old = commit(store, 1)
    files = old.regions["a"].files
    store.carry(1, 2, files)
    store.commit(record(2, write(store, 2), a=RegionState(cursor=7, inner_round=1, files=files)))
    assert store.prune(1) == [1]
    inner = read(store, store.record(2).regions["a"].files, 2, "regions/a/pool-0-")
    assert inner["exp_avg"].tobytes() == flat("exp_avg", 1).tobytes()


def test_carry_does_not_copy_damage(store: CheckpointStore) -> None:
    old = commit(store, 1)
    path = f"{store.folder(1)}/{old.regions['a'].files[0].path}"
    store.fs.pipe_file(path, b"x" + store.fs.cat_file(path)[1:])
    with pytest.raises(CheckpointError, match=f"{path}: damaged"):
        store.carry(1, 2, old.regions["a"].files)


# -- damage -------------------------------------------------------------------------------


def files_of(whole: CommitRecord) -> list[tuple[str, CheckpointFile]]:
    """Every tensor file, with the prefix it is read by."""
    return [("model/", whole.model_files[0]), ("regions/a/pool-0-", whole.regions["a"].files[0])]


@pytest.mark.parametrize("position", [0, 7, 8, 100, -1])
def test_a_flipped_bit_is_found(store: CheckpointStore, position: int) -> None:
    for prefix, file in files_of(commit(store, 1)):
        path = f"{store.folder(1)}/{file.path}"
        data = bytearray(store.fs.cat_file(path))
        data[position] ^= 1
        store.fs.pipe_file(path, bytes(data))
        with pytest.raises(
            CheckpointError, match=f"{path}: damaged: length or digest differs from the commit"
        ):
            read(store, [file], 1, prefix)


@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_a_truncated_file_is_found(store: CheckpointStore, left: int) -> None:
    for prefix, file in files_of(commit(store, 1)):
        path = f"{store.folder(1)}/{file.path}"
        store.fs.pipe_file(path, store.fs.cat_file(path)[:left])
        with pytest.raises(CheckpointError, match=f"{path}: damaged"):
            read(store, [file], 1, prefix)


def test_a_file_that_has_grown_is_found(store: CheckpointStore) -> None:
    for prefix, file in files_of(commit(store, 1)):
        path = f"{store.folder(1)}/{file.path}"
        store.fs.pipe_file(path, store.fs.cat_file(path) + b"x")
        with pytest.raises(CheckpointError, match=f"{path}: damaged"):
            read(store, [file], 1, prefix)


def test_a_deleted_file_is_named(store: CheckpointStore) -> None:
    for prefix, file in files_of(commit(store, 1)):
        path = f"{store.folder(1)}/{file.path}"
        store.fs.rm(path)
        with pytest.raises(CheckpointError, match=f"{path}: named by the commit but missing"):
            read(store, [file], 1, prefix)


def test_a_file_that_never_held_tensors(store: CheckpointStore) -> None:
    """Right length and digest, wrong content: named too, rather than a traceback of safetensors."""
    for data in (b"no tensors at all", safetensors.numpy.save({"anchor.000000": np.zeros(1, np.float32)})):
        file = store._write(1, "model/chunks-000000-000000.safetensors", data)
        with pytest.raises(
            CheckpointError, match=r"chunks-000000-000000\.safetensors: not a checkpoint tensor file"
        ):
            store.read_tensors(1, chunk_files([file], "model/"), range(1))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda text: text[:-10], "damaged"),
        (lambda text: "", "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: json.dumps({**json.loads(text), "format": 2}), "damaged: .*format"),
        (lambda text: json.dumps({**json.loads(text), "tokens": "x"}), "damaged: .*tokens"),
        (lambda text: json.dumps({**json.loads(text), "extra": 1}), "damaged: .*extra"),
    ],
    ids=["truncated", "empty", "another shape", "another format", "wrong type", "unknown field"],
)
def test_a_damaged_record_is_named(store: CheckpointStore, damage: Any, named: str) -> None:
    commit(store, 1)
    path = f"{store.folder(1)}/commit.json"
    store.fs.pipe_file(path, damage(store.fs.cat_file(path).decode()).encode())
    with pytest.raises(CheckpointError, match=f"{path}: {named}"):
        store.record(1)
    with pytest.raises(CheckpointError, match=path):
        store.latest()


# -- URLs ---------------------------------------------------------------------------------


def test_a_relative_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = CheckpointStore("here")
    commit(store, 1)
    monkeypatch.chdir("/")
    assert store.rounds() == [1]
    assert CheckpointStore(tmp_path / "here").rounds() == [1]
    assert CheckpointStore(f"file://{tmp_path}/here").rounds() == [1]


@pytest.mark.parametrize("name", ["with space", "ü", "a#b", "100%", "[x]*"])
def test_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(tmp_path / name)
    whole = commit(store, 1)
    assert CheckpointStore(tmp_path / name).latest() == whole
    assert read(store, whole.model_files)["anchor"].tobytes() == flat("anchor").tobytes()
    commit(store, 2)
    assert store.prune(1) == [1]
    store.clear(2)


def test_a_url_of_an_unknown_kind() -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.url 'nowhere://x': "):
        CheckpointStore("nowhere://x")


def test_a_url_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(
        CheckpointError, match=r"checkpoint\.url 's3://bucket/run': Install s3fs to access S3"
    ):
        CheckpointStore("s3://bucket/run")


def test_a_reader_that_cached_the_listing_sees_new_rounds(store: CheckpointStore) -> None:
    """The driver and the regions are different processes; each has its own view of the bucket."""
    reader = CheckpointStore(store.url)
    commit(store, 1)
    assert reader.rounds() == [1]
    commit(store, 2)
    assert reader.rounds() == [1, 2]
