"""Prepared data: an honest split, whole or absent on the disk, and never mixed with other data."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalm.data.corpus import Document, MemoryCorpus
from megalm.data.datasets import FILES, PreparedData, is_held_out, open_prepared, prepare
from megalm.data.text_files import TextFiles
from megalm.data.tokenizer import train_bpe
from megalm.errors import DataError

WORDS = ["the", "model", "reads", "a", "token", "and", "says", "which", "one", "may", "follow", "it,", "naïvely", "😀"]


def small_corpus(documents: int = 60, seed: int = 0) -> MemoryCorpus:
    draw = random.Random(seed)
    return MemoryCorpus(
        f"{documents} documents",
        tuple(Document(f"d{n}", " ".join(draw.choices(WORDS, k=30)) + f" {seed}/{n}\n") for n in range(documents)),
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare(small_corpus(), tmp_path_factory.mktemp("data") / "small", vocabulary=300, held_out=0.2)


@pytest.fixture
def copy(original: PreparedData, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original.path, tmp_path / "copy"))


def split_texts(data: PreparedData) -> tuple[list[str], list[str]]:
    tokenizer = data.tokenizer()
    train, validation = (
        [tokenizer.decode(file.document(number)[1:].tolist()) for number in range(file.documents)]
        for file in (data.train, data.validation)
    )
    return train, validation


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_prepared(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_document_is_in_one_split_in_order_and_exactly(original: PreparedData) -> None:
    train, validation = split_texts(original)
    texts = [document.text for document in small_corpus().documents()]
    assert train == [text for text in texts if not is_held_out(text, 0.2, 1234)]
    assert validation == [text for text in texts if is_held_out(text, 0.2, 1234)]
    assert 3 <= len(validation) <= 25


def test_every_document_begins_with_the_end_of_text_and_holds_no_other(original: PreparedData) -> None:
    for file in (original.train, original.validation):
        assert np.array_equal(np.flatnonzero(file.tokens == original.end_of_text), file.offsets)


def test_counts_are_those_of_the_text(original: PreparedData) -> None:
    lengths = original.tokenizer().byte_lengths
    for counts, file, texts in zip(
        (original.description.train, original.description.validation),
        (original.train, original.validation),
        split_texts(original),
        strict=True,
    ):
        assert counts.bytes == sum(len(text.encode()) for text in texts) == lengths[file.tokens].sum()
        assert (counts.tokens, counts.documents) == (len(file), len(texts))
    assert set(os.listdir(original.path)) == FILES
    assert original.vocabulary == original.tokenizer().vocabulary == original.train.vocabulary


def test_more_documents_do_not_move_others_to_another_split(original: PreparedData, tmp_path: Path) -> None:
    more = MemoryCorpus("more", small_corpus(20, seed=9).held + small_corpus().held)
    train, validation = split_texts(prepare(more, tmp_path / "more", vocabulary=300, held_out=0.2))
    old_train, old_validation = split_texts(original)
    assert set(old_train) < set(train) and set(old_validation) < set(validation)


def test_the_split_follows_the_seed_and_the_share() -> None:
    texts = [f"document {n}" for n in range(4000)]
    chosen = {seed: {text for text in texts if is_held_out(text, 0.1, seed)} for seed in (1, 2)}
    assert all(330 < len(held_out) < 470 for held_out in chosen.values())
    assert len(chosen[1] & chosen[2]) < 80
    assert chosen[1] < {text for text in texts if is_held_out(text, 0.3, 1)}


def test_the_tokenizer_learns_from_the_training_split_only(tmp_path: Path) -> None:
    corpus = small_corpus()
    data = prepare(corpus, tmp_path / "x", vocabulary=300, held_out=0.2)
    train = [d.text for d in corpus.documents() if not is_held_out(d.text, 0.2, 1234)]
    assert data.tokenizer().fingerprint == train_bpe(train, 300).fingerprint


def test_the_same_text_gives_the_same_bytes_in_another_process(original: PreparedData, tmp_path: Path) -> None:
    program = (
        "import sys; from tests.data.test_datasets import small_corpus; from megalm.data.datasets import prepare;"
        "prepare(small_corpus(), sys.argv[1], vocabulary=300, held_out=0.2)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "again")], check=True)
    for name in sorted(FILES):
        assert (tmp_path / "again" / name).read_bytes() == (original.path / name).read_bytes(), name


def test_the_fingerprint_follows_text_and_tokenizer(original: PreparedData, tmp_path: Path) -> None:
    held = list(small_corpus().held)
    held[0] = Document("d0", held[0].text.replace("token", "tokem").replace("the", "teh") + "!")
    other_text = prepare(
        MemoryCorpus("other", tuple(held)), tmp_path / "a", tokenizer=original.tokenizer(), held_out=0.2
    )
    other_tokenizer = prepare(small_corpus(), tmp_path / "b", vocabulary=290, held_out=0.2)
    same = prepare(small_corpus(), tmp_path / "c", tokenizer=original.tokenizer(), held_out=0.2)
    assert same.fingerprint == original.fingerprint
    assert len({original.fingerprint, other_text.fingerprint, other_tokenizer.fingerprint}) == 3


def test_a_directory_with_other_content_is_refused(copy: Path, tmp_path: Path) -> None:
    before = {name: hashlib.sha256((copy / name).read_bytes()).digest() for name in FILES}
    with pytest.raises(DataError, match=r"already holds prepared data; .*--overwrite"):
        prepare(small_corpus(), copy, vocabulary=300)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (copy / "notes.txt").write_text("mine too")
    for path in (tmp_path / "mine", copy):
        with pytest.raises(DataError, match="not prepared data"):
            prepare(small_corpus(), path, vocabulary=300, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        prepare(small_corpus(), tmp_path / "file", vocabulary=300, overwrite=True)
    assert before == {name: hashlib.sha256((copy / name).read_bytes()).digest() for name in FILES}
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_overwriting_leaves_the_new_data_alone_in_its_place(copy: Path) -> None:
    data = prepare(small_corpus(50, seed=3), copy, vocabulary=280, held_out=0.2, overwrite=True)
    assert data.vocabulary == 280 and data.description.corpus == "50 documents"
    assert [entry.name for entry in copy.parent.iterdir()] == ["copy"]
    (copy.parent / "empty").mkdir()
    prepare(small_corpus(), copy.parent / "empty", vocabulary=280, held_out=0.2)


def test_a_failure_leaves_nothing_behind_and_the_old_data_as_it_was(copy: Path, original: PreparedData) -> None:
    file = copy.parent / "bad.jsonl"
    file.write_text('{"text": "good"}\n' * 5 + "bad\n")
    for tokenizer in (None, original.tokenizer()):
        with pytest.raises(DataError, match=r"bad\.jsonl:6"):
            prepare(
                TextFiles.find([file]),
                copy,
                vocabulary=None if tokenizer else 300,
                tokenizer=tokenizer,
                overwrite=True,
            )
    assert sorted(entry.name for entry in copy.parent.iterdir()) == ["bad.jsonl", "copy"]
    assert open_prepared(copy).fingerprint == original.fingerprint


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write"):
        prepare(small_corpus(), tmp_path / "file" / "data", vocabulary=300)


@pytest.mark.parametrize(
    ("texts", "reason"), [([], "no text"), (["  \n"], "no text"), (["a document"], "leaves . for training")]
)
def test_too_little_text_is_an_error(tmp_path: Path, texts: list[str], reason: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text("".join(texts))
    with pytest.raises(DataError, match=reason):
        prepare(TextFiles.find([file]), tmp_path / "out", vocabulary=300)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1, float("nan")])
def test_an_impossible_share_is_an_error(tmp_path: Path, held_out: float) -> None:
    with pytest.raises(DataError, match="held-out share"):
        prepare(small_corpus(), tmp_path / "x", vocabulary=300, held_out=held_out)


def test_a_short_held_out_split_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny = next(f"{n}" for n in range(1000) if is_held_out(f"{n}", 0.1, 1234))
    large = next(f"{n} " * 500 for n in range(1000) if not is_held_out(f"{n} " * 500, 0.1, 1234))
    corpus = MemoryCorpus("uneven", (Document("tiny", tiny), Document("large", large)))
    prepare(corpus, tmp_path / "x", vocabulary=257, held_out=0.1)
    assert "held-out documents are short" in caplog.text


def test_missing_data_says_how_to_make_it(tmp_path: Path) -> None:
    path = tmp_path / "none"
    assert f"megalm data prepare --corpus builtin --out {path}" in error_of(path)
    path.mkdir()
    assert "holds no prepared data" in error_of(path)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_or_empty_or_truncated_file_is_an_error(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    for damaged in (b"", content[: len(content) // 2]):
        (copy / name).write_bytes(damaged)
        assert name in error_of(copy)
    (copy / name).unlink()
    assert name in error_of(copy)


def test_a_tokenizer_of_other_data_is_an_error(copy: Path, tmp_path: Path) -> None:
    train_bpe(["other text"], 300).save(copy)
    assert "does not belong to" in error_of(copy)


def test_token_files_of_other_data_are_an_error(copy: Path, original: PreparedData, tmp_path: Path) -> None:
    other = prepare(small_corpus(seed=5), tmp_path / "other", tokenizer=original.tokenizer(), held_out=0.2)
    shutil.copy(other.train.path, copy)
    assert "describes other token files" in error_of(copy)


def test_a_description_that_was_edited_is_an_error(copy: Path) -> None:
    facts = json.loads((copy / "data.json").read_text())
    for change in (
        {"train": facts["train"] | {"tokens": 1}},
        {"tokenizer": facts["tokenizer"] | {"vocabulary": 50_000}},
        {"tokenizer": facts["tokenizer"] | {"end_of_text": 300}},
        {"format_version": 2},
        {"seed": "1"},
        {"more": 1},
    ):
        (copy / "data.json").write_text(json.dumps(facts | change))
        assert "data.json" in error_of(copy)


def test_verify_reads_the_tokens(copy: Path) -> None:
    data = open_prepared(copy)
    data.verify()
    content = bytearray(data.validation.path.read_bytes())
    content[200] ^= 1
    data.validation.path.write_bytes(content)
    with pytest.raises(DataError, match="checksum"):
        open_prepared(copy).verify()


def test_preparing_a_stream_takes_memory_of_a_batch_and_not_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "large.jsonl"
    line = json.dumps({"text": "a line of text that says little and says it often " * 40}) + "\n"
    with open(file, "w") as stream:
        for number in range(3_000):
            stream.write(line.replace("little", f"little {number}", 1))
    tokenizer = train_bpe(["x"], 257)  # a token for each byte: the most tokens that a text can have
    program = (
        "import re, sys; from megalm.data.datasets import prepare; from megalm.data.tokenizer import Tokenizer;"
        "from megalm.data.text_files import TextFiles; tokenizer = Tokenizer.load(sys.argv[3]);"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024;"
        "before = peak();"
        "prepare(TextFiles.find([sys.argv[1]]), sys.argv[2], tokenizer=tokenizer);"
        "print(peak() - before)"
    )
    tokenizer.save(tmp_path)
    command = [sys.executable, "-c", program, str(file), str(tmp_path / "out"), str(tmp_path)]
    grown_bytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{file.stat().st_size} bytes of text, {grown_bytes} bytes of memory")
    assert file.stat().st_size > 6_000_000
    assert grown_bytes < 250_000_000
