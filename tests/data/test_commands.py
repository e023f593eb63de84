"""The data and tokenizer commands: plain arguments in, printable facts out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.data.commands import (
    inspect_command,
    inspect_tokenizer_command,
    prepare_command,
    train_tokenizer_command,
    verify_command,
)
from megalm.errors import ConfigError, DataError


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[str, dict[str, object]]:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Paragraph {n} of a text about rank {n % 7}." for n in range(100)))
    out = str(tmp_path / "data")
    return out, prepare_command(None, [str(file)], 300, out, None, 0.2, 5, False, separator="")


def test_prepare_inspect_and_verify_agree_and_are_json(prepared: tuple[str, dict[str, object]]) -> None:
    out, facts = prepared
    assert json.loads(json.dumps(facts)) == facts
    seen = inspect_command(out)
    assert seen.pop("held_out_begins").startswith("Paragraph ")
    assert seen == facts
    assert verify_command(out) == {"path": out, "fingerprint": facts["fingerprint"], "verified": True}
    assert facts["seed"] == 5 and facts["held_out"] == 0.2
    assert facts["train"]["documents"] + facts["validation"]["documents"] == 100  # type: ignore[index]


def test_a_trained_tokenizer_can_be_used_to_prepare(tmp_path: Path) -> None:
    out = str(tmp_path / "tokenizer")
    facts = train_tokenizer_command("topics", [], 500, out)
    assert facts["vocabulary"] == 500 and len(facts["longest_tokens"]) == 10
    assert inspect_tokenizer_command(out)["fingerprint"] == facts["fingerprint"]
    data = prepare_command("topics", [], None, str(tmp_path / "data"), out)
    assert (data["vocabulary"], data["tokenizer_fingerprint"]) == (500, facts["fingerprint"])
    with pytest.raises(DataError, match="already exists"):
        train_tokenizer_command("topics", [], 500, out)
    assert train_tokenizer_command("topics", [], 400, out, overwrite=True)["vocabulary"] == 400


def test_the_text_must_be_named_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text was given"):
        prepare_command(None, [], 300, str(tmp_path / "x"))
    with pytest.raises(DataError, match="both"):
        prepare_command("topics", ["a.txt"], 300, str(tmp_path / "x"))
    with pytest.raises(ConfigError, match="did you mean builtin"):
        prepare_command("bultin", [], 300, str(tmp_path / "x"))


def test_an_option_without_use_is_refused(tmp_path: Path) -> None:
    text, objects, out = tmp_path / "a.txt", tmp_path / "b.jsonl.gz", str(tmp_path / "x")
    text.write_text("a")
    objects.write_bytes(b"")
    with pytest.raises(DataError, match="--vocab=300 is the size of a tokenizer to learn, and --tokenizer=t brings"):
        prepare_command("topics", [], 300, out, "t")
    for corpus, files, options in (
        ("topics", [], {"separator": ""}),
        ("topics", [], {"text_field": "text"}),
        (None, [str(text)], {"text_field": "body"}),
        (None, [str(objects)], {"separator": "---"}),
    ):
        for command in (prepare_command, train_tokenizer_command):
            with pytest.raises(
                DataError, match=r"^--(separator|text-field)=.* is for \.(txt|jsonl) files, and none is"
            ):
                command(corpus, files, None, out, **options)  # type: ignore[operator]
    assert not Path(out).exists()


def test_no_text_is_refused_before_anything_is_learned_or_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty, short, out = tmp_path / "empty.txt", tmp_path / "short.txt", tmp_path / "x"
    empty.write_bytes(b"")
    short.write_text("all in one document")
    for command in (prepare_command, train_tokenizer_command):
        with pytest.raises(DataError, match=r"empty\.txt: there is no text in it; give files that hold text"):
            command(None, [str(empty)], 300, str(out))
    with pytest.raises(DataError, match=r"a held-out share of 0\.05 of 1 document leaves 1 for training and 0 for val"):
        prepare_command(None, [str(short)], 300, str(out))
    with pytest.raises(DataError, match=r"short\.txt is a file; choose a directory for the tokenizer"):
        train_tokenizer_command(None, [str(short)], 300, str(short))
    assert not out.exists() and not caplog.records, "as of a vocabulary that the text does not fill"


def test_verify_fails_on_a_flipped_bit(prepared: tuple[str, dict[str, object]]) -> None:
    file = Path(prepared[0]) / "train.tokens"
    content = bytearray(file.read_bytes())
    content[300] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.tokens is damaged"):
        verify_command(prepared[0])
