import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from xcloud.data import TOKENIZERS, BytesTokenizer, BytesTokenizerConfig, HuggingFaceTokenizerConfig
from xcloud.errors import ModelError

TEXTS = [
    "",
    "plain ascii",
    "  leading, double  and trailing spaces \n\n\t",
    "Grüße, 世界 — ¿qué tal? 🙂 \u0301",
    "control \x00\x01\x7f and \u2028 line",
    "spelled <|endoftext|> in the text",
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def save_tiny_tokenizer(folder, *, eos):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat"] * 5, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos).save_pretrained(folder)


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids.tolist(), tokenizer.eos_id]) == text


def test_bytes_decode_refuses_ids_outside_the_vocabulary():
    with pytest.raises(ModelError, match="257"):
        BytesTokenizer().decode([65, 257])


def test_saved_bytes_tokenizer_agrees_with_auto_tokenizer(tmp_path):
    tokenizer = BytesTokenizerConfig().build()
    tokenizer.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token_id == tokenizer.eos_id
    assert len(loaded) == tokenizer.vocab_size
    for text in [*TEXTS, "".join(map(chr, range(0x500)))]:
        ids = loaded(text)["input_ids"]
        assert ids == tokenizer.encode(text).tolist(), text
        assert loaded.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    through_xcloud = HuggingFaceTokenizerConfig(path=str(tmp_path)).build()
    assert (through_xcloud.vocab_size, through_xcloud.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert through_xcloud.encode(TEXTS[-1]).tolist() == tokenizer.encode(TEXTS[-1]).tolist()


def test_huggingface_tokenizer_encodes_decodes_and_saves(tmp_path):
    save_tiny_tokenizer(tmp_path / "tiny", eos="<eos>")
    tokenizer = TOKENIZERS.parse({"type": "huggingface", "path": str(tmp_path / "tiny")}).build()
    tokenizer.save(tmp_path / "again")
    again = HuggingFaceTokenizerConfig(path=str(tmp_path / "again")).build()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint32
        assert ids.size == 0 or ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == text
        assert again.encode(text).tolist() == ids.tolist()
    assert len(tokenizer.encode("the cat")) < len("the cat")
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert again.fingerprint() == tokenizer.fingerprint()


def test_tokenizers_with_other_ids_have_other_fingerprints(tmp_path):
    save_tiny_tokenizer(tmp_path / "a", eos="<eos>")
    save_tiny_tokenizer(tmp_path / "b", eos="<end>")
    names = [HuggingFaceTokenizerConfig(path=str(tmp_path / n)).build().fingerprint() for n in "ab"]
    assert len({*names, BytesTokenizer().fingerprint()}) == 3


def test_tokenizer_without_eos_is_refused(tmp_path):
    save_tiny_tokenizer(tmp_path, eos=None)
    with pytest.raises(ModelError, match=r"no eos token"):
        HuggingFaceTokenizerConfig(path=str(tmp_path)).build()


@pytest.mark.parametrize("name", ["missing", "empty", "broken"])
def test_folder_without_a_tokenizer_is_named(tmp_path, name):
    folder = tmp_path / name
    if name != "missing":
        folder.mkdir()
    if name == "broken":
        (folder / "tokenizer.json").write_text("{ not json")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match=name):
        HuggingFaceTokenizerConfig(path=str(folder)).build()


def test_config_refuses_unknown_keys():
    with pytest.raises(ValidationError, match="trust_remote_code"):
        TOKENIZERS.parse({"type": "huggingface", "path": "x", "trust_remote_code": True})
