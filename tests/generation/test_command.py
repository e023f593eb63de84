"""What `megalm generate` writes and refuses."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megalm.errors import ConfigError
from megalm.generation.command import generate
from tests.trained_run import make_run

PROMPT = "north 3 is"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with data and a checkpoint."""
    return make_run(tmp_path_factory.mktemp("generate"))


def test_text_begins_with_the_prompt_unless_it_is_not_wanted(run: Path) -> None:
    whole = generate(str(run), (), PROMPT, tokens=12, seed=3)
    rest = generate(str(run), (), PROMPT, tokens=12, seed=3, echo=False)
    assert whole is not None and rest
    assert whole == PROMPT + rest


def test_the_seed_decides_the_text_and_greedy_needs_none(run: Path) -> None:
    texts = [generate(str(run), (), PROMPT, tokens=20, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [generate(str(run), (), PROMPT, tokens=20, temperature=0.0, seed=seed) for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_an_empty_prompt_begins_a_document(run: Path) -> None:
    text = generate(str(run), (), "", tokens=5, temperature=0.0)
    assert text and "<|endoftext|>" not in text


def test_a_prompt_beyond_the_window_is_seen_from_its_end(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = "south 4 is not south 5. " * 10
    with caplog.at_level(logging.WARNING):
        text = generate(str(run), (), "north " + long, tokens=6, temperature=0.0, echo=False)
    assert "the model sees the last 16 of them" in caplog.text
    assert text == generate(str(run), (), long, tokens=6, temperature=0.0, echo=False)


def test_wrong_values_are_found_before_the_run_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="top_k=0"):
        generate(str(tmp_path), (), PROMPT, top_k=0)
    with pytest.raises(ConfigError, match=r"run\.dir"):
        generate(str(tmp_path), (), PROMPT)
