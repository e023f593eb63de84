"""The text a model learns from: documents, corpora, and the corpora that Python itself brings.

Owns what a `Document` and a `Corpus` are, and the built-in corpora, which need no download. A user's own
files are read by `text_files`; tokens are the business of `datasets`.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megalm.errors import DataError
from megalm.registry import Registry

logger = logging.getLogger(__name__)

# A paragraph this long or longer is kept only the first time. Python's topics repeat whole sections (a fifth
# of their text), which would otherwise stand in the training split and in the held-out split at once.
REPEATED_PARAGRAPH_CHARACTERS = 40
# What removal of repeats leaves of a document may be a fragment without meaning.
SMALLEST_DOCUMENT_CHARACTERS = 200
LARGEST_SOURCE_BYTES = 4 << 20
SKIPPED_DIRECTORIES = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
RULER_CHARACTERS = frozenset("+-=|_~*^#<>.:'` \t")


@dataclass(frozen=True)
class Document:
    """One text that belongs together; `name` says where it came from (a topic, a module, `file:line`)."""

    name: str
    text: str


class Corpus(Protocol):
    """Documents that can be gone through more than once, in the same order each time."""

    @property
    def description(self) -> str:
        """One line for people: what the text is."""

    def documents(self) -> Iterator[Document]:
        """Go through all documents from the first, holding about one at a time."""


@dataclass(frozen=True)
class MemoryCorpus:
    """A corpus small enough to be held whole."""

    description: str
    held: tuple[Document, ...]

    def documents(self) -> Iterator[Document]:
        """Go through all documents from the first."""
        return iter(self.held)


CORPORA: Registry[Callable[[], MemoryCorpus]] = Registry("corpus")


@CORPORA.register("topics")
def topics_corpus() -> MemoryCorpus:
    """Return Python's documentation topics (`help("if")` shows one): about 340 kB in 70 documents."""
    return MemoryCorpus(
        f"documentation topics of Python {platform.python_version()}", tuple(cleaned(topic_documents()))
    )


@CORPORA.register("builtin")
def builtin_corpus() -> MemoryCorpus:
    """Return the documentation topics and the standard library's docstrings: about 2 MB in 520 documents."""

    def both() -> Iterator[Document]:
        yield from topic_documents()
        yield from docstring_documents(Path(sysconfig.get_path("stdlib")))

    return MemoryCorpus(
        f"documentation topics and standard library docstrings of Python {platform.python_version()}",
        tuple(cleaned(both())),
    )


def topic_documents() -> Iterator[Document]:
    """Yield one document for each documentation topic, by name. Raises DataError if this Python has none."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"this Python ({sys.executable}) has no documentation topics: {error}; give files of your own"
        ) from error
    for name in sorted(topics):
        yield Document(f"topics/{name}", topics[name])


def docstring_documents(library: Path) -> Iterator[Document]:
    """Yield one document for each module under `library` that has docstrings, by name; nothing is imported.

    Test packages and installed packages are left out, and files that are not modules of the standard library.
    Raises DataError if there are no sources.
    """
    sources = {}
    for parent, directories, names in os.walk(library):
        directories[:] = [name for name in directories if name not in SKIPPED_DIRECTORIES]
        for path in (Path(parent, name) for name in names if name.endswith(".py")):
            parts = path.relative_to(library).with_suffix("").parts
            if parts[0] in sys.stdlib_module_names:
                sources[".".join(parts).removesuffix(".__init__")] = path
    if not sources:
        raise DataError(f"no sources of the standard library are installed at {library}; use the corpus topics")
    for module in sorted(sources):
        text = "\n\n".join(docstrings(sources[module]))
        if text:
            yield Document(f"docstrings/{module}", text)


def docstrings(path: Path) -> list[str]:
    """Return the docstrings of a module, its classes and its functions, in the order of the source.

    Raises DataError if the file cannot be read. A file that is not Python of this version gives none, with a
    warning.
    """
    try:
        if path.stat().st_size > LARGEST_SOURCE_BYTES:
            return []
        source = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; repair the Python installation") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the standard library's own invalid escapes are not the user's concern
            tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        logger.warning("%s is left out of the corpus: %s", path, error)
        return []
    found: list[str] = []
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            # A surrogate written as an escape is not text, and has no UTF-8.
            if text and not any("\ud800" <= character <= "\udfff" for character in text):
                found.append(text)
        # Definitions stand in the bodies of statements only; expressions, most of the tree, need no visit.
        bodies = (getattr(node, field, ()) for field in ("body", "cases", "handlers", "orelse", "finalbody"))
        inner = [child for body in bodies if isinstance(body, list) for child in body]
        pending.extend(reversed(inner))
    return found


def cleaned(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield the documents without drawings, tables and repeated paragraphs; mere fragments are left out."""
    seen: set[bytes] = set()
    for document in documents:
        paragraphs = []
        for paragraph in without_drawings(document.text).split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) >= REPEATED_PARAGRAPH_CHARACTERS:
                digest = hashlib.blake2b(words.encode(), digest_size=16).digest()
                if digest in seen:
                    continue
                seen.add(digest)
            if words:
                paragraphs.append(paragraph.strip("\n"))
        text = "\n\n".join(paragraphs) + "\n"
        if len(text) >= SMALLEST_DOCUMENT_CHARACTERS:
            yield Document(document.name, text)


def without_drawings(text: str) -> str:
    """Return `text` without rulers, boxes, rows of tables, and white space at the ends of lines."""
    kept = []
    for line in text.expandtabs().splitlines():
        body = line.strip()
        is_ruler = len(body) >= 4 and RULER_CHARACTERS.issuperset(body)
        is_table_row = len(body) >= 2 and body[0] in "+|" and body[-1] in "+|"
        if not (is_ruler or is_table_row):
            kept.append(line.rstrip())
    return "\n".join(kept)
