"""Text to token ids and back: byte-level BPE, and BPE of others that falls back to bytes.

Owns training, loading and the fingerprint of a tokenizer. Where the text comes from and where the tokens go
is left to `corpus` and `datasets`. Sources: Sennrich et al. 2016 (BPE); Radford et al. 2019 (on bytes), so
every text has tokens.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from megalm.errors import DataError
from megalm.files import require_regular, write_durably

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
"""What parts documents, by the names that GPT-2 and Qwen, Llama 3, Llama 2 and Mistral, and Gemma gave it."""
FILE_NAME = "tokenizer.json"
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end of text
LARGEST_VOCABULARY = 1 << 20
LARGEST_FILE_BYTES = 256 << 20
# An encoding is about a hundred times as large as its text, so text is encoded in batches of this many
# characters.
BATCH_CHARACTERS = 1 << 20
# A trainer holds every distinct word it has seen; this much text is plenty for any vocabulary.
LARGEST_TRAINING_CHARACTERS = 1 << 29
# The trainer reads some hundred texts ahead; long ones are given to it in pieces.
TRAINING_PIECE_CHARACTERS = 1 << 16

_BYTES = frozenset(f"<0x{number:02X}>" for number in range(256))
_SPACE = "\u2581"  # stands for a space in tokenizers that fall back to bytes

PARALLELISM = "TOKENIZERS_PARALLELISM"
USERS_PARALLELISM = os.environ.get(PARALLELISM)


class Tokenizer:
    """A BPE tokenizer with an end-of-text token that has tokens for every text.

    Of those made here `decode(encode(text)) == text`. One that marks words by a character in place of a space, as Llama
    2 has it, may lose a space in front of a text.
    """

    def __init__(self, serialized: bytes, source: str = "the tokenizer") -> None:
        """Read a `tokenizer.json`. Raises DataError, naming `source`, if it is not one of this kind."""
        try:
            self._inner = tokenizers.Tokenizer.from_buffer(serialized)
        except Exception as error:  # the library raises plain Exception and ValueError alike
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{source} is not a tokenizer.json: {reason}; make one with megalm tokenizer train"
            ) from error
        self.end_token = _end_of_text(self._inner)
        end = None if self.end_token is None else self._inner.token_to_id(self.end_token)
        if self.end_token is None or end is None:
            raise DataError(
                f"{source} has no {END_OF_TEXT} token, which parts documents (nor a special token "
                f"{', '.join(ENDS_OF_TEXT[1:])}); add it to the tokenizer"
            )
        # Text may spell out a special token; it is then text, and must not become a boundary between
        # documents.
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        self.serialized = serialized
        self.end_of_text: int = end
        self.byte_lengths = _byte_lengths(self._inner, source)
        # Where a mark is put in front of every text, a piece of a text has other tokens than in the whole.
        self._may_be_cut = self.encode("a b") == self.encode("a") + self.encode(" b")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Return the tokenizer in a `tokenizer.json` or a directory that holds one. Raises DataError."""
        file = Path(path)
        file = file / FILE_NAME if file.is_dir() else file
        return cls(read_tokenizer_file(file), str(file))

    def save(self, directory: str | Path) -> Path:
        """Write `tokenizer.json` into `directory` and return its path."""
        file = Path(directory) / FILE_NAME
        write_durably(file, self.serialized)
        return file

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the `tokenizer.json`, in hexadecimal."""
        return fingerprint_of(self.serialized)

    @property
    def vocabulary(self) -> int:
        """Number of token ids: every id is below it."""
        return len(self.byte_lengths)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without end-of-text tokens."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are not whole characters become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def encode_documents(self, texts: Iterable[str]) -> Iterator[NDArray[np.uint32]]:
        """Yield the token ids of each text, equal to `encode`; texts are encoded in batches, on all cores."""
        batch: list[str] = []
        last_of_text: list[bool] = []
        parts: list[NDArray[np.uint32]] = []
        characters = 0

        def encoded() -> Iterator[NDArray[np.uint32]]:
            with worker_threads():
                encodings = self._inner.encode_batch_fast(batch, add_special_tokens=False)
            for encoding, is_last in zip(encodings, last_of_text, strict=True):
                parts.append(np.array(encoding.ids, dtype=np.uint32))
                if is_last:
                    yield np.concatenate(parts)
                    parts.clear()
            batch.clear()
            last_of_text.clear()

        for text in texts:
            for piece, is_last in pieces(text, BATCH_CHARACTERS if self._may_be_cut else len(text)):
                batch.append(piece)
                last_of_text.append(is_last)
                characters += len(piece)
                if characters >= BATCH_CHARACTERS:
                    yield from encoded()
                    characters = 0
        yield from encoded()


def train_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Return a tokenizer of at most `vocabulary` ids; the same texts give the same tokenizer.

    A text too small to fill the vocabulary gives a smaller one, with a warning. Raises DataError for a
    vocabulary that cannot hold the bytes.
    """
    if not SMALLEST_VOCABULARY <= vocabulary <= LARGEST_VOCABULARY:
        raise DataError(
            f"a vocabulary of {vocabulary} tokens is not possible; "
            f"use {SMALLEST_VOCABULARY} (bytes and end of text) to {LARGEST_VOCABULARY}"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    with worker_threads():
        inner.train_from_iterator(_first_characters(texts, LARGEST_TRAINING_CHARACTERS), trainer)
    tokenizer = Tokenizer(inner.to_str().encode())
    if tokenizer.vocabulary < vocabulary:
        logger.warning("the text fills a vocabulary of %d tokens, not %d", tokenizer.vocabulary, vocabulary)
    return tokenizer


def fingerprint_of(serialized: bytes) -> str:
    """Return the fingerprint of a tokenizer from the bytes of its `tokenizer.json`."""
    return hashlib.sha256(serialized).hexdigest()


def read_tokenizer_file(file: Path) -> bytes:
    """Return the bytes of a `tokenizer.json`. Raises DataError if it cannot be one."""
    try:
        require_regular(file)
        if file.stat().st_size > LARGEST_FILE_BYTES:
            raise DataError(f"{file} is larger than {LARGEST_FILE_BYTES} bytes; give a tokenizer.json")
        return file.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read tokenizer {file}: {error.strerror}; copy the one that the data was made with (a run's "
            "is that of its data.path), or make one with megalm tokenizer train"
        ) from error


def pieces(text: str, characters: int) -> Iterator[tuple[str, bool]]:
    """Yield (piece, whether it is the last) of a text: together they have the tokens of the whole."""
    start, end = 0, -1
    while end < len(text):
        end = safe_cut(text, start, start + characters)
        yield text[start:end], end == len(text)
        start = end


def safe_cut(text: str, start: int, limit: int) -> int:
    """Return a place in (start, len(text)] where `text` can be cut without changing its tokens.

    That is the last place before `limit` between a character that is not white space and a space, which no
    word of a byte-level tokenizer spans; if there is none, the first one from `limit` on, or the end of the
    text.
    """
    if limit >= len(text):
        return len(text)
    place = limit
    while (place := text.rfind(" ", start + 1, place)) >= 0:
        if not text[place - 1].isspace():
            return place
    place = limit - 1
    while (place := text.find(" ", place + 1)) >= 0:
        if not text[place - 1].isspace():
            return place
    return len(text)


@contextmanager
def worker_threads() -> Iterator[None]:
    """Let the tokenizers library use threads inside, not afterwards, unless the user has decided otherwise.

    Left on, a process forked later would inherit locks of threads it does not have, and could hang.
    """
    if USERS_PARALLELISM is not None:
        yield
        return
    os.environ[PARALLELISM] = "true"
    try:
        yield
    finally:
        os.environ[PARALLELISM] = "false"


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        for piece, _ in pieces(text, TRAINING_PIECE_CHARACTERS):
            yield piece
        limit -= len(text)
        if limit <= 0:
            return


def _end_of_text(inner: tokenizers.Tokenizer) -> str | None:
    """Return the token that parts documents: ours wherever it stands, another's name only as a special token."""
    if inner.token_to_id(END_OF_TEXT) is not None:
        return END_OF_TEXT
    special = {token.content for token in inner.get_added_tokens_decoder().values() if token.special}
    return next((name for name in ENDS_OF_TEXT if name in special), None)


def _byte_lengths(inner: tokenizers.Tokenizer, source: str) -> NDArray[np.int64]:
    """Return how many bytes of text each id stands for, int64 [vocabulary]; 0 for special tokens."""
    special = inner.get_added_tokens_decoder()
    vocabulary = inner.get_vocab()
    if max(vocabulary.values()) >= LARGEST_VOCABULARY:
        raise DataError(f"{source} has token {max(vocabulary.values())}; at most {LARGEST_VOCABULARY} tokens are read")
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    falls_back = all(token in vocabulary for token in _BYTES)
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, number in vocabulary.items():
        if number in special:
            lengths[number] = 0 if special[number].special else len(token.encode())
        elif falls_back:
            lengths[number] = 1 if token in _BYTES else len(token.replace(_SPACE, " ").encode())
        elif alphabet.issuperset(token):
            lengths[number] = len(token)
        else:
            raise DataError(
                f"{source} is neither a byte-level tokenizer nor one that falls back to bytes (token {token[:40]!r}); "
                "make one with megalm tokenizer train"
            )
    return lengths
