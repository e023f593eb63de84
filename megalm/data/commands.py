"""What `megalm data` and `megalm tokenizer` do, as functions that return what is to be printed.

Owns the choice of corpus and tokenizer from plain arguments. Argument parsing and printing are left to
`megalm.cli`. Every result can be written as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.data.corpus import CORPORA, Corpus
from megalm.data.datasets import PreparedData, SplitCounts, open_prepared, prepare
from megalm.data.text_files import TextFiles
from megalm.data.tokenizer import FILE_NAME, Tokenizer, train_bpe
from megalm.errors import DataError

SAMPLE_TOKENS = 64
VOCABULARY = 2048
"""Tokens of a tokenizer that is learned, where nobody says how many."""


def prepare_command(
    corpus: str | None,
    files: Sequence[str],
    vocab: int | None,
    out: str,
    tokenizer: str | None = None,
    held_out: float = 0.05,
    seed: int = 1234,
    overwrite: bool = False,
    separator: str | None = None,
    text_field: str | None = None,
) -> dict[str, Any]:
    """Make a directory of prepared data from a named corpus, or from files and directories of text.

    `tokenizer`: a `tokenizer.json` to use instead of learning one of `vocab` tokens (None: VOCABULARY).
    `separator`: the line that parts the documents of a .txt file (empty: blank lines; None: a file is a
    document). `text_field`: where a .jsonl object keeps its text (None: under "text").
    """
    if tokenizer is not None and vocab is not None:
        raise DataError(
            f"--vocab={vocab} is the size of a tokenizer to learn, and --tokenizer={tokenizer} brings one; "
            "leave one of them out"
        )
    chosen = choose_corpus(corpus, files, separator, text_field)
    given = None if tokenizer is None else Tokenizer.load(tokenizer)
    data = prepare(
        chosen,
        out,
        vocabulary=(vocab or VOCABULARY) if given is None else None,
        tokenizer=given,
        held_out=held_out,
        seed=seed,
        overwrite=overwrite,
    )
    return summary(data)


def inspect_command(path: str) -> dict[str, Any]:
    """Describe a directory of prepared data, with the beginning of its held-out text."""
    data = open_prepared(path)
    start = data.validation.document(0)[1 : 1 + SAMPLE_TOKENS]
    return summary(data) | {"held_out_begins": data.tokenizer().decode(start.tolist())}


def verify_command(path: str) -> dict[str, Any]:
    """Read all tokens of a directory of prepared data and compare them with their checksums."""
    data = open_prepared(path)
    data.verify()
    return {"path": str(data.path), "fingerprint": data.fingerprint, "verified": True}


def train_tokenizer_command(
    corpus: str | None,
    files: Sequence[str],
    vocab: int | None,
    out: str,
    overwrite: bool = False,
    separator: str | None = None,
    text_field: str | None = None,
) -> dict[str, Any]:
    """Learn a tokenizer from a named corpus or from files, and write it as `out`/tokenizer.json."""
    file = Path(out) / FILE_NAME
    if file.exists() and not overwrite:
        raise DataError(f"{file} already exists; choose another directory, or allow it with --overwrite")
    if file.parent.exists() and not file.parent.is_dir():
        raise DataError(f"{out} is a file; choose a directory for the tokenizer")
    chosen = choose_corpus(corpus, files, separator, text_field)
    if next(iter(chosen.documents()), None) is None:
        raise DataError(f"{chosen.description}: there is no text in it; give files that hold text")
    tokenizer = train_bpe((document.text for document in chosen.documents()), vocab or VOCABULARY)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(file.parent)
    except OSError as error:
        raise DataError(f"cannot write {file}: {error.strerror}; choose another directory or make room") from error
    return inspect_tokenizer_command(str(file))


def inspect_tokenizer_command(path: str) -> dict[str, Any]:
    """Describe a tokenizer, with its longest tokens."""
    tokenizer = Tokenizer.load(path)
    longest = tokenizer.byte_lengths.argsort(kind="stable")[::-1][:10]
    return {
        "path": path,
        "vocabulary": tokenizer.vocabulary,
        "end_of_text": tokenizer.end_of_text,
        "fingerprint": tokenizer.fingerprint,
        "longest_tokens": [tokenizer.decode([int(number)]) for number in longest],
    }


def choose_corpus(name: str | None, files: Sequence[str], separator: str | None, text_field: str | None) -> Corpus:
    """Return the corpus that is meant.

    Raises DataError for none or two, and for an option that no file of it has a use for; ConfigError for an unknown
    name.
    """
    if (name is None) == (not files):
        given = "both a corpus and files were given" if files else "no text was given"
        raise DataError(f"{given}; give a corpus ({', '.join(CORPORA.names())}) or files of your own")
    chosen: Corpus
    if name is None:
        chosen = TextFiles.find(files, separator, text_field or "text")
        kinds = {file.name.removesuffix(".gz").rpartition(".")[2] for file in chosen.files}
    else:
        chosen, kinds = CORPORA.get(name)(), set()
    for option, value, kind in (("--separator", separator, "txt"), ("--text-field", text_field, "jsonl")):
        if value is not None and kind not in kinds:
            raise DataError(f"{option}={value} is for .{kind} files, and none is given; leave it out")
    return chosen


def summary(data: PreparedData) -> dict[str, Any]:
    """Return the facts of prepared data that a user asks for."""
    about = data.description
    return {
        "path": str(data.path),
        "corpus": about.corpus,
        "fingerprint": data.fingerprint,
        "vocabulary": data.vocabulary,
        "tokenizer_fingerprint": about.tokenizer.fingerprint,
        "held_out": about.held_out,
        "seed": about.seed,
        "train": _split_summary(about.train),
        "validation": _split_summary(about.validation),
    }


def _split_summary(counts: SplitCounts) -> dict[str, Any]:
    return counts.model_dump() | {"bytes_per_token": round(counts.bytes / max(1, counts.tokens - counts.documents), 3)}
