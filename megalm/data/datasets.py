"""A corpus made ready for training, as a directory: `megalm data prepare` writes it, training opens it.

Owns the split, the directory and its description in `data.json`; the token format is `token_file`'s.

    train.tokens  validation.tokens  tokenizer.json  data.json
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from megalm.answers import counted
from megalm.data.corpus import Corpus
from megalm.data.token_file import REMEDY, TokenFile, TokenFileWriter
from megalm.data.tokenizer import FILE_NAME, Tokenizer, fingerprint_of, read_tokenizer_file, train_bpe
from megalm.data.windows import Windows, training_windows
from megalm.errors import DataError
from megalm.files import require_regular, sync_directory, write_durably

logger = logging.getLogger(__name__)

DESCRIPTION = "data.json"
TRAIN, VALIDATION = "train", "validation"
FILES = frozenset({f"{TRAIN}.tokens", f"{VALIDATION}.tokens", FILE_NAME, DESCRIPTION})
LARGEST_DESCRIPTION_BYTES = 1 << 20


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SplitCounts(_Record):
    """How much text a split holds. `bytes`: of the text in UTF-8, without end-of-text tokens."""

    tokens: int
    documents: int
    bytes: int


class TokenizerFacts(_Record):
    """What is known of a tokenizer without loading it. Every token id is below `vocabulary`."""

    fingerprint: str
    vocabulary: int
    end_of_text: int


class Description(_Record):
    """The content of `data.json`.

    `fingerprint` is a function of the tokens of both splits and of the tokenizer, and of nothing else.
    """

    format: Literal["megalm-data"] = "megalm-data"
    format_version: Literal[1] = 1
    corpus: str
    held_out: float
    seed: int
    tokenizer: TokenizerFacts
    train: SplitCounts
    validation: SplitCounts
    fingerprint: str


@dataclass(frozen=True)
class PreparedData:
    """A directory of prepared data, open for reading."""

    path: Path
    description: Description
    train: TokenFile
    validation: TokenFile

    @property
    def fingerprint(self) -> str:
        """Identifies the tokens of both splits and the tokenizer."""
        return self.description.fingerprint

    @property
    def tokenizer_fingerprint(self) -> str:
        """Identifies the tokenizer that made the tokens."""
        return self.description.tokenizer.fingerprint

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.description.tokenizer.vocabulary

    @property
    def end_of_text(self) -> int:
        """Id of the token that each document begins with."""
        return self.description.tokenizer.end_of_text

    def windows(self, sequence: int, rows: str) -> Windows:
        """Return the training samples of that many tokens. Raises DataError if there is none."""
        return training_windows(self.train, sequence, rows)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that made the tokens."""
        return Tokenizer.load(self.path)

    def verify(self) -> None:
        """Read all tokens. Raises DataError if a file does not match its checksum."""
        self.train.verify()
        self.validation.verify()


def prepare(
    corpus: Corpus,
    out: str | Path,
    *,
    vocabulary: int | None = None,
    tokenizer: Tokenizer | None = None,
    held_out: float = 0.05,
    seed: int = 1234,
    overwrite: bool = False,
) -> PreparedData:
    """Write `corpus` as tokens to the directory `out`, which appears there whole or not at all, and open it.

    Give either a `tokenizer`, or a `vocabulary` to learn one of from the training split. About `held_out` of
    the documents become the validation split. The corpus is gone through as a stream, twice when a tokenizer
    is learned, and its beginning once more. Raises DataError: a split without text, an `out` that holds
    something else, a disk that does not take it. A process killed in between leaves nothing but a hidden
    directory `.NAME.partial-...` beside `out`, which may be deleted.
    """
    assert (vocabulary is None) != (tokenizer is None), "give a vocabulary or a tokenizer, not both"
    if not 0 < held_out < 1:
        raise DataError(f"a held-out share of {held_out} is not possible; use one between 0 and 1, such as 0.05")
    out = Path(os.path.realpath(out))
    _refuse_other_content(out, overwrite)
    _refuse_empty_splits(corpus, held_out, seed)
    if tokenizer is None:
        assert vocabulary is not None
        texts = (text for text, is_validation in _split_texts(corpus, held_out, seed) if not is_validation)
        tokenizer = train_bpe(texts, vocabulary)
    partial = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        train, validation = _write_splits(corpus, tokenizer, partial, held_out, seed)
        tokenizer.save(partial)
        description = Description(
            corpus=corpus.description,
            held_out=held_out,
            seed=seed,
            tokenizer=TokenizerFacts(
                fingerprint=tokenizer.fingerprint,
                vocabulary=tokenizer.vocabulary,
                end_of_text=tokenizer.end_of_text,
            ),
            train=train,
            validation=validation,
            fingerprint=_data_fingerprint(*_open_splits(partial)),
        )
        write_durably(partial / DESCRIPTION, (description.model_dump_json(indent=2) + "\n").encode())
        _move_into_place(partial, out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}; choose another directory or make room") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_prepared(out)


def open_prepared(path: str | Path) -> PreparedData:
    """Open what `prepare` wrote; headers, sizes and fingerprints are checked, all tokens only by `verify`.

    Raises DataError: nothing there, a file that is missing, truncated or foreign, a tokenizer of other data.
    """
    path = Path(path)
    description = _read_description(path)
    train, validation = _open_splits(path)
    found = fingerprint_of(read_tokenizer_file(path / FILE_NAME))
    for name, expected in [
        (DESCRIPTION, description.tokenizer.fingerprint),
        (train.path.name, train.tokenizer_fingerprint),
        (validation.path.name, validation.tokenizer_fingerprint),
    ]:
        if expected != found:
            raise DataError(
                f"{path / FILE_NAME} does not belong to {name}: its fingerprint is {found[:12]}, "
                f"the data has {expected[:12]}; put the right tokenizer back, or {REMEDY}"
            )
    if not _describes(description, train, validation):
        raise DataError(f"{path / DESCRIPTION} describes other token files than those beside it; {REMEDY}")
    return PreparedData(path, description, train, validation)


def is_held_out(text: str, held_out: float, seed: int) -> bool:
    """Say whether a document is for validation: by a hash of its text, so that no other document matters."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=f"{seed}/held-out".encode()).digest()
    return int.from_bytes(digest, "little") < held_out * 2.0**64


def _split_texts(corpus: Corpus, held_out: float, seed: int) -> Iterator[tuple[str, bool]]:
    for document in corpus.documents():
        yield document.text, is_held_out(document.text, held_out, seed)


def _refuse_empty_splits(corpus: Corpus, held_out: float, seed: int) -> None:
    """Raise DataError unless each split has a document; nothing is read behind the first of each."""
    documents = [0, 0]
    for _, is_validation in _split_texts(corpus, held_out, seed):
        documents[is_validation] += 1
        if all(documents):
            return
    if not any(documents):
        raise DataError(f"{corpus.description}: there is no text in it; give files that hold text")
    raise DataError(
        f"a held-out share of {held_out} of {counted(sum(documents), 'document')} leaves {documents[0]} for training "
        f"and {documents[1]} for validation; give more documents (a separator line can split a file), another share "
        "or another seed"
    )


def _write_splits(
    corpus: Corpus, tokenizer: Tokenizer, directory: Path, held_out: float, seed: int
) -> tuple[SplitCounts, SplitCounts]:
    """Write both token files and return what train and validation hold."""
    waiting: deque[tuple[bool, int]] = deque()
    text_bytes = [0, 0]

    def texts() -> Iterator[str]:
        for text, is_validation in _split_texts(corpus, held_out, seed):
            waiting.append((is_validation, len(text.encode())))
            yield text

    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                TokenFileWriter(directory / f"{split}.tokens", tokenizer.vocabulary, tokenizer.fingerprint)
            )
            for split in (TRAIN, VALIDATION)
        ]
        for ids in tokenizer.encode_documents(texts()):
            is_validation, size = waiting.popleft()
            writers[is_validation].append(np.concatenate([[tokenizer.end_of_text], ids]))
            text_bytes[is_validation] += size
        train, validation = (
            SplitCounts(tokens=writer.tokens, documents=writer.documents, bytes=size)
            for writer, size in zip(writers, text_bytes, strict=True)
        )
    share = validation.bytes / (train.bytes + validation.bytes)
    if share < held_out / 2:
        logger.warning(
            "the held-out documents are short: %.1f%% of the text, where %.1f%% were asked for; "
            "another seed or a larger share gives a steadier perplexity",
            100 * share,
            100 * held_out,
        )
    return train, validation


def _open_splits(directory: Path) -> tuple[TokenFile, TokenFile]:
    return TokenFile(directory / f"{TRAIN}.tokens"), TokenFile(directory / f"{VALIDATION}.tokens")


def _data_fingerprint(train: TokenFile, validation: TokenFile) -> str:
    parts = (train.fingerprint, validation.fingerprint, train.tokenizer_fingerprint)
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def _describes(description: Description, train: TokenFile, validation: TokenFile) -> bool:
    """Say whether a description is that of these files: the same tokens, and as many as it says."""
    return description.fingerprint == _data_fingerprint(train, validation) and all(
        (counts.tokens, counts.documents) == (len(file), file.documents)
        and description.tokenizer.vocabulary == file.vocabulary > description.tokenizer.end_of_text
        for counts, file in [(description.train, train), (description.validation, validation)]
    )


def _read_description(path: Path) -> Description:
    if not path.exists():
        raise DataError(
            f"there is no prepared data at {path}; make it with megalm data prepare --corpus builtin --out {path}"
        )
    file = path / DESCRIPTION
    try:
        require_regular(file)
        with open(file, "rb") as stream:
            return Description.model_validate_json(stream.read(LARGEST_DESCRIPTION_BYTES))
    except OSError as error:
        raise DataError(
            f"{path} holds no prepared data: cannot read {file}: {error.strerror}; give the --out of a "
            "megalm data prepare, or make new data with it in another place"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(f"{file} is damaged or of another version ({where}: {first['msg']}); {REMEDY}") from error


def _refuse_other_content(out: Path, overwrite: bool) -> None:
    """Raise DataError unless `out` is free to be written, or holds prepared data that may be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file; choose a directory for the prepared data")
    content = {entry.name for entry in out.iterdir()}
    if not content:
        return
    if DESCRIPTION not in content or not content <= FILES:
        raise DataError(
            f"{out} holds files that are not prepared data ({min(content - FILES, default=min(content))}); "
            "choose a new or empty directory"
        )
    if not overwrite:
        raise DataError(f"{out} already holds prepared data; choose another directory, or allow it with --overwrite")


def _move_into_place(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; prepared data that is there steps aside first and is deleted last."""
    replaced = out.with_name(f".{out.name}.replaced-{secrets.token_hex(4)}")
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    sync_directory(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)
