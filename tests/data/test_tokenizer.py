"""The tokenizer: exact on every text, the same on every run, and never fooled by text that looks like a token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data import tokenizer as module
from megalm.data.corpus import CORPORA
from megalm.data.tokenizer import END_OF_TEXT, Tokenizer, pieces, train_bpe
from megalm.errors import DataError

# Every character that UTF-8 can write: all but the surrogates.
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
spaced_text = st.text(st.sampled_from("ab'9 \n\t.\u00a0é"), max_size=300)


@pytest.fixture(scope="module")
def topics() -> list[str]:
    return [document.text for document in CORPORA.get("topics")().documents()]


@pytest.fixture(scope="module")
def tokenizer(topics: list[str]) -> Tokenizer:
    return train_bpe(topics, 1024)


@settings(deadline=None, max_examples=300)
@given(text=any_text)
def test_decoding_gives_back_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_spells_the_end_of_text_is_text(tokenizer: Tokenizer) -> None:
    text = f"before{END_OF_TEXT}after"
    ids = tokenizer.encode(text)
    (in_batch,) = tokenizer.encode_documents([text])
    assert tokenizer.end_of_text not in ids and in_batch.tolist() == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.end_of_text]) == END_OF_TEXT


def test_a_word_of_the_text_is_one_token_and_ids_fill_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" function")) == 1
    assert tokenizer.vocabulary == 1024
    assert tokenizer.end_of_text < tokenizer.vocabulary


@settings(deadline=None, max_examples=100)
@given(text=any_text)
def test_byte_lengths_of_tokens_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.byte_lengths[tokenizer.encode(text)].sum() == len(text.encode())


@settings(deadline=None, max_examples=300)
@given(text=spaced_text, size=st.integers(1, 20))
def test_pieces_of_a_text_have_the_tokens_of_the_whole(tokenizer: Tokenizer, text: str, size: int) -> None:
    parts = list(pieces(text, size))
    assert "".join(part for part, _ in parts) == text
    assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]
    assert [number for part, _ in parts for number in tokenizer.encode(part)] == tokenizer.encode(text)


def test_documents_in_batches_equal_documents_alone(
    tokenizer: Tokenizer, topics: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 5000)
    texts = [*topics[:12], "", "x", "y" * 20_000]
    batched = [ids.tolist() for ids in tokenizer.encode_documents(texts)]
    assert batched == [tokenizer.encode(text) for text in texts]


def test_training_is_the_same_in_another_process_and_with_other_threads(topics: list[str]) -> None:
    program = (
        "from megalm.data.corpus import CORPORA; from megalm.data.tokenizer import train_bpe;"
        "print(train_bpe((d.text for d in CORPORA.get('topics')().documents()), 600).fingerprint)"
    )
    expected = train_bpe(topics, 600).fingerprint
    for setting in ("false", "true"):
        environment = os.environ | {"TOKENIZERS_PARALLELISM": setting, "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "5"}
        found = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == expected


def test_threads_are_off_after_a_batch_unless_the_user_chose(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "USERS_PARALLELISM", None)
    monkeypatch.delenv(module.PARALLELISM, raising=False)
    list(tokenizer.encode_documents(["text"]))
    assert os.environ[module.PARALLELISM] == "false"
    monkeypatch.setattr(module, "USERS_PARALLELISM", "true")
    monkeypatch.setenv(module.PARALLELISM, "true")
    list(tokenizer.encode_documents(["text"]))
    assert os.environ[module.PARALLELISM] == "true"


def test_saved_and_loaded_it_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tokenizer.save(tmp_path)
    for path in (file, tmp_path):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("for x in y") == tokenizer.encode("for x in y")
        assert np.array_equal(loaded.byte_lengths, tokenizer.byte_lengths)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a tokenizer.json"),
        (b"{}", "not a tokenizer.json"),
        (b"\xff\xfe", "not a tokenizer.json"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_an_error_of_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_tokenizer_without_bytes_or_end_of_text_is_refused(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer.serialized)
    with pytest.raises(DataError, match=r"no <.endoftext.> token"):
        Tokenizer(json.dumps(content).replace(END_OF_TEXT, "<s>").encode())
    content["model"]["vocab"]["\u2581word"] = tokenizer.vocabulary
    with pytest.raises(DataError, match="not a byte-level tokenizer"):
        Tokenizer(json.dumps(content).encode())


def test_a_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read tokenizer"):
        Tokenizer.load(tmp_path / "none")


@pytest.mark.parametrize("vocabulary", [0, 256, 1 << 21])
def test_an_impossible_vocabulary_is_an_error(vocabulary: int) -> None:
    with pytest.raises(DataError, match=f"vocabulary of {vocabulary} tokens"):
        train_bpe(["text"], vocabulary)


def test_a_small_text_gives_a_smaller_vocabulary_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert train_bpe(["ab ab ab"], 2048).vocabulary < 270
    assert "not 2048" in caplog.text


def test_an_error_in_the_text_reaches_the_caller_as_it_is() -> None:
    def texts() -> object:
        yield "good"
        raise DataError("a.txt:2: bad")

    with pytest.raises(DataError, match=r"^a\.txt:2: bad$"):
        train_bpe(texts(), 300)  # type: ignore[arg-type]
