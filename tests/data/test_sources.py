import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import xcloud
from xcloud.data import SOURCES, sources
from xcloud.errors import DataError


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")


def build(**settings):
    return SOURCES.parse(settings).build()


def read(**settings):
    """(id, text) of every document; the second pass and describe() must work too."""
    source = build(**settings)
    rows = [(document.id, document.text) for document in source.documents()]
    assert rows == [(document.id, document.text) for document in source.documents()]
    assert "\n" not in source.describe()
    assert source.fingerprint() == build(**settings).fingerprint()
    return rows


# --- text


def test_text_spellings_of_a_folder_give_the_same_ids(tmp_path, monkeypatch):
    corpus = tmp_path / "corpus"
    (corpus / "deep").mkdir(parents=True)
    (corpus / "b.txt").write_text("two", "utf-8")
    (corpus / "a.txt").write_text("eins ü", "utf-8")
    (corpus / "deep" / "c.txt").write_text("three", "utf-8")
    (corpus / "note.md").write_text("not text", "utf-8")
    expected = [("corpus/a.txt", "eins ü"), ("corpus/b.txt", "two"), ("corpus/deep/c.txt", "three")]
    assert read(type="text", paths=str(corpus)) == expected
    assert read(type="text", paths=[f"{corpus}/**/*.txt"]) == expected
    assert read(type="text", paths=[f"{corpus}/a.txt", f"{corpus}/*.txt"]) == expected[:2]
    monkeypatch.chdir(tmp_path)
    assert read(type="text", paths="corpus") == expected
    assert read(type="text", paths="file://" + str(corpus)) == expected


def test_text_reads_fsspec_urls():
    with fsspec.open("memory://xcloud-test/books/one.txt", "w") as file:
        file.write("in memory")
    assert read(type="text", paths="memory://xcloud-test/books/*.txt") == [("books/one.txt", "in memory")]


def test_text_follows_links_and_unpacks_gzip(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "blob").write_text("linked")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.txt").symlink_to(tmp_path / "store" / "blob")
    (tmp_path / "c" / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    expected = [("c/a.txt", "linked"), ("c/b.txt.gz", "packed")]
    assert read(type="text", paths=str(tmp_path / "c")) == expected
    assert read(type="text", paths=f"{tmp_path}/c/*.txt*") == expected


def test_large_text_is_cut_at_blank_lines(tmp_path):
    paragraph = "x" * 99_000 + "\n\n"
    (tmp_path / "big.txt").write_text(paragraph * 30)
    rows = read(type="text", paths=f"{tmp_path}/big.txt")
    assert [name.rpartition("/")[2] for name, _ in rows] == ["big.txt", "big.txt#1", "big.txt#2"]
    assert "".join(text for _, text in rows) == paragraph * 30
    assert all(text.endswith("\n\n") and len(text) <= 1 << 20 for _, text in rows)


@given(
    text=st.text(alphabet="aü世🙂\n\r", max_size=400),
    piece=st.integers(8, 40),
)
def test_cutting_loses_nothing(tmp_path_factory, text, piece):
    path = tmp_path_factory.mktemp("cut") / "t.txt"
    path.write_bytes(text.encode("utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", piece)
        texts = [document.text for document in build(type="text", paths=str(path)).documents()]
    assert "".join(texts) == text
    assert all(len(part.encode("utf-8")) <= piece for part in texts)


def test_bytes_that_are_no_utf8_are_replaced(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ok \xff\xfe end")
    assert read(type="text", paths=f"{tmp_path}/a.txt")[0][1] == "ok \ufffd\ufffd end"


def test_fingerprint_follows_content_and_settings(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = build(type="text", paths=str(path)).fingerprint()
    assert build(type="text", paths=str(path), max_bytes=2).fingerprint() != before
    path.write_text("two more")
    changed = build(type="text", paths=str(path)).fingerprint()
    assert changed != before
    os.utime(path, (1, 1))
    assert build(type="text", paths=str(path)).fingerprint() != changed


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
@pytest.mark.parametrize("name", ["nowhere.txt", "no*where", "empty"])
def test_missing_files_are_named(tmp_path, kind, name):
    (tmp_path / "empty").mkdir()
    source = build(type=kind, paths=f"{tmp_path}/{name}")
    for call in (source.documents, source.fingerprint):
        with pytest.raises(DataError) as caught:
            call()
        assert f"{tmp_path}/{name}" in str(caught.value)


def test_unknown_protocol_is_a_data_error():
    with pytest.raises(DataError, match="nosuch://bucket/x"):
        build(type="text", paths="nosuch://bucket/x").documents()


# --- common settings


def test_max_bytes_ends_the_source(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("üü")  # four bytes
    for limit, expected in [(4, ["üü"]), (7, ["üü", "ü"]), (8, ["üü", "üü"]), (99, ["üü"] * 3)]:
        assert [text for _, text in read(type="text", paths=str(tmp_path), max_bytes=limit)] == expected
    assert "first 7 bytes" in build(type="text", paths="x", max_bytes=7).describe()


@pytest.mark.parametrize(
    "settings",
    [
        {"type": "text", "paths": "x", "max_bytes": 0},
        {"type": "text", "paths": []},
        {"type": "text", "paths": "x", "colour": "red"},
        {"type": "stdlib", "kind": "jokes"},
        {"type": "huggingface", "path": "x", "trust_remote_code": True},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        SOURCES.parse(settings)


def test_known_sources():
    assert SOURCES.names == ["huggingface", "jsonl", "parquet", "stdlib", "text"]


# --- jsonl


def test_jsonl_plain_and_gzip(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "zwei ü \\ud800", "n": 2}\n')
    (tmp_path / "d" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}'))
    assert read(type="jsonl", paths=str(tmp_path / "d")) == [
        ("d/a.jsonl#1", "one"),
        ("d/a.jsonl#3", "zwei ü ?"),
        ("d/b.jsonl.gz#1", "three"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", "Expecting"),
        ("[1]", "found list"),
        ('{"txet": "x"}', "did you mean 'txet'"),
        ("{}", "found keys none"),
        ('{"text": 5}', "found int"),
    ],
)
def test_jsonl_names_the_bad_line(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        list(build(type="jsonl", paths=str(path)).documents())
    message = str(caught.value)
    assert f"{path}, line 2: expected a JSON object with a string under 'text'" in message
    assert problem in message


def test_damaged_gzip_names_the_file(tmp_path):
    whole = gzip.compress(json.dumps({"text": os.urandom(999).hex()}).encode())
    for name, content in {"cut": whole[:-300], "junk": b"no gzip at all"}.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"cannot read .*{name}.jsonl.gz"):
            list(build(type="jsonl", paths=str(path)).documents())


# --- parquet


def test_parquet_streams_rows_and_skips_nulls(tmp_path):
    rows = [f"row {i}" for i in range(1300)]
    rows[700] = None
    table = pa.table({"n": range(1300), "text": rows, "label": pa.array(["x"] * 1300).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    found = read(type="parquet", paths=str(tmp_path))
    assert [text for _, text in found] == [row for row in rows if row is not None]
    assert found[-1][0] == f"{tmp_path.name}/a.parquet#1299"
    assert read(type="parquet", paths=f"{tmp_path}/a.parquet", column="label", max_bytes=2)[-1][1] == "x"


def test_parquet_problems_name_file_and_column(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["x"], "n": [1]}), path)
    for column, problem in {
        "contents": "did you mean 'content'",
        "n": "holds int64, expected strings",
    }.items():
        with pytest.raises(DataError) as caught:
            list(build(type="parquet", paths=str(path), column=column).documents())
        assert all(part in str(caught.value) for part in (str(path), repr(column), problem))
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(build(type="parquet", paths=str(path)).documents())


# --- huggingface


def rows_of(*texts):
    return datasets.Dataset.from_dict({"text": list(texts), "n": list(range(len(texts)))})


@pytest.mark.parametrize("streaming", [True, False])
def test_huggingface_reads_a_load_dataset_folder(tmp_path, streaming):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    (folder / "test.jsonl").write_text('{"text": "other"}\n')
    settings = {"type": "huggingface", "path": str(folder), "streaming": streaming}
    assert read(**settings) == [("corpus/train#0", "one"), ("corpus/train#2", "two")]
    assert read(**settings, split="test") == [("corpus/test#0", "other")]
    with pytest.raises(DataError, match="validation"):
        list(build(**settings, split="validation").documents())
    with pytest.raises(DataError, match=r"no column 'txt'.*did you mean 'text'"):
        list(build(**settings, column="txt").documents())


def test_huggingface_reads_a_saved_dataset(tmp_path):
    rows_of("one", "two").save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    assert read(type="huggingface", path=path) == [("saved/train#0", "one"), ("saved/train#1", "two")]
    with pytest.raises(DataError, match=r"no column 'body'; its columns: text, n"):
        list(build(type="huggingface", path=path, column="body").documents())
    with pytest.raises(DataError, match=r"row 0: column 'n' holds int"):
        list(build(type="huggingface", path=path, column="n").documents())


def test_huggingface_reads_a_saved_dataset_dict(tmp_path):
    datasets.DatasetDict(train=rows_of("one"), test=rows_of("two")).save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    assert read(type="huggingface", path=path, split="test") == [("saved/test#0", "two")]
    with pytest.raises(DataError, match=r"no split 'dev'; its splits: test, train"):
        list(build(type="huggingface", path=path, split="dev").documents())


def test_huggingface_names_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        build(type="huggingface", path=f"{tmp_path}/nowhere").documents()
    with pytest.raises(DataError, match="nobody/nothing"):
        list(build(type="huggingface", path="nobody/nothing").documents())
    assert build(type="huggingface", path="nobody/nothing").fingerprint()


# --- stdlib


def test_stdlib_kinds_are_large_and_disjoint():
    kinds = {kind: dict(read(type="stdlib", kind=kind)) for kind in ("modules", "tests", "reference")}
    sizes = {kind: sum(map(len, rows.values())) for kind, rows in kinds.items()}
    assert all(size > 300_000 for size in sizes.values()), sizes
    assert "modules/argparse.py" in kinds["modules"]
    assert not any("/test" in name or "site-packages" in name for name in kinds["modules"])
    assert "reference/lambda" in kinds["reference"]
    names = [name for rows in kinds.values() for name in rows]
    assert len(names) == len(set(names))
    long_texts = [text for rows in kinds.values() for text in rows.values() if len(text) > 2000]
    assert len(long_texts) - len(set(long_texts)) < len(long_texts) / 20


def test_stdlib_tests_fall_back_to_installed_packages(tmp_path, monkeypatch):
    (tmp_path / "test" / "support").mkdir(parents=True)
    (tmp_path / "test" / "support" / "__init__.py").write_text("pass")
    monkeypatch.setattr(sources, "_stdlib_folder", lambda: tmp_path)
    source = build(type="stdlib", kind="tests", max_bytes=2_000_000)
    assert "installed packages" in source.describe()
    rows = [(document.id, document.text) for document in source.documents()]
    assert sum(len(text.encode()) for _, text in rows) > 1_900_000
    assert all(name.startswith("tests/packages/") for name, _ in rows)


def test_stdlib_test_suite_leaves_broken_files_out(tmp_path, monkeypatch):
    suite = tmp_path / "test"
    (suite / "encoded_modules").mkdir(parents=True)
    (suite / "test_big.py").write_text("# " + "x" * sources.MIN_TEST_SUITE_BYTES)
    (suite / "badsyntax_3131.py").write_text("€ = 2")
    (suite / "bad_coding.py").write_text("# coding: uft-8")
    (suite / "encoded_modules" / "module_koi8_r.py").write_bytes("# Познание".encode("koi8-r"))
    monkeypatch.setattr(sources, "_stdlib_folder", lambda: tmp_path)
    source = build(type="stdlib", kind="tests")
    assert "test suite" in source.describe()
    assert [document.id for document in source.documents()] == ["tests/test_big.py"]


def test_stdlib_without_files_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_stdlib_folder", lambda: tmp_path)
    monkeypatch.setattr(sources, "_package_folders", list)
    with pytest.raises(DataError, match=f"modules in {tmp_path}"):
        list(build(type="stdlib", kind="modules").documents())
    with pytest.raises(DataError, match="found no standard library tests"):
        list(build(type="stdlib", kind="tests").documents())


# --- weight


def test_package_imports_nothing_heavy():
    heavy = ("torch", "ray", "deepspeed", "transformers", "datasets", "pyarrow", "tokenizers")
    code = f"import sys, xcloud.data; print([m for m in {heavy} if m in sys.modules])"
    root = Path(xcloud.__path__[0]).parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
