"""The built-in corpora: real text, without repeats, the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.data.corpus import (
    CORPORA,
    Document,
    MemoryCorpus,
    cleaned,
    docstring_documents,
    docstrings,
    without_drawings,
)
from megalm.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def builtin() -> MemoryCorpus:
    return CORPORA.get("builtin")()


def test_builtin_holds_the_topics_and_five_times_as_much_text(builtin: MemoryCorpus) -> None:
    topics = CORPORA.get("topics")()
    assert builtin.held[: len(topics.held)] == topics.held
    sizes = [sum(len(document.text) for document in corpus.held) for corpus in (topics, builtin)]
    assert sizes[0] > 250_000
    assert sizes[1] > 4 * sizes[0]


def test_builtin_names_are_unique_and_sorted_and_leave_tests_out(builtin: MemoryCorpus) -> None:
    names = [document.name for document in builtin.documents()]
    assert len(set(names)) == len(names)
    modules = [name for name in names if name.startswith("docstrings/")]
    assert modules == sorted(modules)
    assert "docstrings/json" in modules and "docstrings/json.decoder" in modules
    assert not [name for name in modules if {"test", "tests", "idle_test"} & set(name.split("/")[1].split("."))]


def test_no_long_paragraph_of_the_builtin_corpus_stands_in_it_twice(builtin: MemoryCorpus) -> None:
    seen: set[str] = set()
    for document in builtin.documents():
        for paragraph in document.text.split("\n\n"):
            words = " ".join(paragraph.split())
            assert len(words) < 40 or words not in seen, f"{document.name} repeats {words[:80]}"
            seen.add(words)


def test_an_unknown_corpus_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"topic.*did you mean topics.*builtin"):
        CORPORA.get("topic")


def test_docstrings_stand_in_the_order_of_the_source_and_nothing_is_run(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        '"""Module."""\nraise SystemExit\nclass A:\n    """Class."""\n    def f(self):\n        """Method."""\n'
        '        def g():\n            """Inner."""\nasync def h():\n    """Last."""\nx = "no docstring"\n'
        'try:\n    def i():\n        """Try."""\nexcept E:\n    if x:\n        def j():\n            """If."""\n'
        '    else:\n        def k():\n            """Else."""\nfinally:\n    class B:\n        """Finally."""\n'
    )
    expected = ["Module.", "Class.", "Method.", "Inner.", "Last.", "Try.", "If.", "Else.", "Finally."]
    assert docstrings(source) == expected


def test_a_docstring_with_half_a_surrogate_pair_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text('"""Half: \\ud800."""\ndef f():\n    """Whole."""\n')
    assert docstrings(source) == ["Whole."]


def test_only_modules_of_the_standard_library_are_read(tmp_path: Path) -> None:
    for name in ("json/__init__.py", "json/tests/more.py", "site-packages/json.py", "not_a_stdlib_module.py", "re.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'"""{name}"""')
    found = [(document.name, document.text) for document in docstring_documents(tmp_path)]
    assert found == [("docstrings/json", "json/__init__.py"), ("docstrings/re", "re.py")]


def test_a_library_without_sources_is_an_error_and_not_an_empty_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sources"):
        list(docstring_documents(tmp_path))


def test_drawings_and_tables_go_and_text_stays() -> None:
    text = "Title\n*****\n\n+---+---+\n| a | b |\n+===+===+\n\n   a | b  \n>>> x\n..."
    assert without_drawings(text) == "Title\n\n\n   a | b\n>>> x\n..."


def test_repeated_paragraphs_and_fragments_are_removed() -> None:
    long = "All of this paragraph is repeated in another document. " * 5
    first = Document("first", f"{long}\n\nShort.\n\nShort.")
    second = Document("second", f"Something else.\n\n  {long}")
    assert list(cleaned([first, second])) == [Document("first", f"{long.rstrip()}\n\nShort.\n\nShort.\n")]
