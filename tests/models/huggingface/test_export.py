"""What is exported is checked by transformers, whole or not at all; what no family has is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm import cli
from megalm.checkpoint.writer import write_checkpoint
from megalm.config.model import ModelSection
from megalm.data.tokenizer import Tokenizer, train_bpe
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.errors import CheckpointError, ConfigError, StorageError
from megalm.models.huggingface import checking, exporting
from megalm.models.huggingface.exporting import choose, export_model
from megalm.models.huggingface.importing import import_model
from megalm.models.huggingface.mapping import Row
from tests.models.huggingface.families import CONFIGS
from tests.models.huggingface.plain import make, tensors_of, values_of
from tests.trained_run import make_run

LLAMA: dict[str, Any] = {
    "layers": 2, "hidden": 8, "heads": 2, "sequence": 16, "norm": "rmsnorm", "position": "rotary", "bias": False,
    "activation": "swiglu", "tie_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of a small GPT-2."""
    return make_run(tmp_path_factory.mktemp("run"))


def test_a_run_of_ours_goes_out_with_its_tokenizer(run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert cli.main(["export-hf", str(run), "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    names = {"config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json"}
    assert {path.name for path in out.iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}
    ours, theirs = Tokenizer.load(run), transformers.AutoTokenizer.from_pretrained(out)
    text = "north 3 is not  north 4.\n"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    config = json.loads((out / "config.json").read_text())
    assert theirs.eos_token_id == ours.end_of_text == config["eos_token_id"]
    unknown = (theirs.bos_token, theirs.unk_token, config["bos_token_id"], config["pad_token_id"])
    assert unknown == (None, None, None, None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_sinks": True}, ["model.attention_sinks=true"]),
        ({"qk_norm": True, "attention_gate": True}, ["model.attention_gate=true"]),
        ({"rotary_scaling": "ntk", "rotary_factor": 2.0}, ["model.rotary_scaling=ntk", "model.rotary_factor=2.0"]),
        ({"residual_scale": 0.5}, ["model.residual_scale=0.5"]),
        ({"mtp_depth": 1}, ["model.mtp_depth=1"]),
        ({"nope_every": 2}, ["model.nope_every=2"]),
        ({"activation": "relu2"}, ["model.activation=relu2"]),
        ({"experts": 4, "expert_ffn": 8, "router_score": "sigmoid"}, ["model.router_score=sigmoid"]),
        ({"experts": 4, "expert_ffn": 8, "shared_experts": 1}, ["model.shared_experts=1"]),
        ({"experts": 4, "expert_ffn": 8, "capacity_factor": 1.0}, ["model.capacity_factor=1.0"]),
    ],
)
def test_what_no_family_has_is_named(changes: dict[str, Any], named: list[str]) -> None:
    model = ModelSection.model_validate({**LLAMA, **changes})
    with pytest.raises(ConfigError) as caught:
        choose(model, 13, None)
    for one in named:
        assert one in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "Llama"),
        ({"window": 5}, "Mistral"),
        ({"qkv_bias": True}, "Qwen2"),
        ({"window": 5, "window_pattern": "LS"}, None),
        ({"window": 5, "window_pattern": "LS", "qkv_bias": True}, "Qwen2"),
        ({"qk_norm": True}, "Qwen3"),
        ({"experts": 4, "expert_ffn": 8}, "Mixtral"),
        ({"experts": 4, "expert_ffn": 8, "qk_norm": True, "dense_layers": 1}, "Qwen3-MoE"),
        ({"init_std": 0.5, "dropout": 0.1, "kernels": "reference", "document_mask": True}, "Llama"),
    ],
)
def test_the_family_is_the_first_that_has_the_model(changes: dict[str, Any], family: str | None) -> None:
    model = ModelSection.model_validate({**LLAMA, **changes})
    if family is None:
        with pytest.raises(ConfigError, match=r"no family .* has model"):
            choose(model, 13, None)
    else:
        assert choose(model, 13, None)[0].name == family


def exchanged(rows: tuple[Row, ...], ours: str) -> Iterator[Row]:
    """Yield a table in which the first two of a line's names are exchanged."""
    for row in rows:
        first, second, *rest = (*row.theirs, "", "")
        yield dataclasses.replace(row, theirs=(second, first, *filter(None, rest))) if row.ours == ours else row


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("llama", "blocks.{n}.mlp.up.{x}"),
        ("llama", "blocks.{n}.attention.qkv.{x}"),
        ("mixtral", "blocks.{n}.mlp.experts.up.weight"),
    ],
)
def test_a_broken_table_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ours: str) -> None:
    pytest.importorskip("transformers")
    import_model(make(tmp_path / "source", values_of(name)), tmp_path / "run")
    plain = exporting.bind
    monkeypatch.setattr(exporting, "bind", lambda rows, *args: plain(tuple(exchanged(rows, ours)), *args))
    with pytest.raises(CheckpointError, match="computes other logits"):
        export_model(tmp_path / "run", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "run"}


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "final_logit_softcapping", "sliding_window"])
def test_a_wrong_word_in_the_config_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    pytest.importorskip("transformers")
    import_model(make(tmp_path / "source", values_of("gemma 2")), tmp_path / "run")
    wrong = {"rope_theta": 9000.0, "rms_norm_eps": 1.0, "final_logit_softcapping": 3.0, "sliding_window": 5}

    def chosen(*args: Any) -> Any:
        family, values = choose(*args)
        return family, {**values, key: wrong[key]}

    monkeypatch.setattr(exporting, "choose", chosen)
    with pytest.raises(CheckpointError, match="computes other logits"):
        export_model(tmp_path / "run", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "run"}


def test_what_is_missing_is_said_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="no averaged weights"):
        export_model(run, out, averaged=True)
    with pytest.raises(CheckpointError, match="no checkpoint of step 99"):
        export_model(run, out, step=99)
    with pytest.raises(ConfigError, match=r"^--family=llama: Llama has no model\.sequence=16, model\.norm=layernorm, "):
        export_model(run, out, family="llama")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    with pytest.raises(CheckpointError, match="is there already"):
        export_model(run, tmp_path / "taken")
    monkeypatch.setattr(checking, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'megalm\[hf\]'"):
        export_model(run, out)
    assert {path.name for path in tmp_path.iterdir()} == {"taken"}


@pytest.mark.parametrize(
    ("number", "dtype", "reason"),
    [
        (float("nan"), None, r"^model\.norm\.weight holds numbers that are not finite; .*--step"),
        (float("inf"), "fp32", r"^model\.norm\.weight holds numbers that are not finite"),
        (1e30, "fp16", r"^model\.norm\.weight holds 1e\+30, too large for --dtype=fp16; give --dtype=bf16"),
        (3e38, "fp32", "^the model's own logits of random prompts are not finite in fp32"),
    ],
)
def test_weights_that_nothing_can_be_compared_with_are_named(
    tmp_path: Path, number: float, dtype: str | None, reason: str
) -> None:
    pytest.importorskip("transformers")
    norm = {"model.norm.weight": torch.tensor([1.0, number, *[1.0] * 46])}
    import_model(make(tmp_path / "source", values_of("llama"), **norm), tmp_path / "run")
    with pytest.raises(CheckpointError, match=reason):
        export_model(tmp_path / "run", tmp_path / "out", dtype=dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "run"}


def test_what_is_rounded_is_said(tmp_path: Path) -> None:
    """A model in bf16 whose routers are in fp32, as it is written in one dtype."""
    pytest.importorskip("transformers")
    values = values_of("mixtral")
    mixed = {name: tensor if "gate" in name else tensor.bfloat16() for name, tensor in tensors_of(values).items()}
    assert import_model(make(tmp_path / "source", values, **mixed), tmp_path / "run")["precision"] == "bf16"
    router = "model.layers.{}.block_sparse_moe.gate.weight"
    rounded = export_model(tmp_path / "run", tmp_path / "out")["rounded"]
    assert rounded == f"{', '.join(router.format(n) for n in range(3))} and 1 more"
    assert export_model(tmp_path / "run", tmp_path / "whole", dtype="fp32")["rounded"] == "none"


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: Any, descriptor: int, data: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megalm.checkpoint.files.FileSystem.write", write)
    with pytest.raises(StorageError, match="No space left"):
        export_model(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_average_goes_out_where_there_is_one(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from megalm.checkpoint.reader import CheckpointReader

    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.yaml", "tokenizer.json"):
        (copy / name).write_bytes((run / name).read_bytes())
    reader = CheckpointReader(run / "checkpoints" / "step-00000005")
    fragments = []
    for name in reader.names("weight"):
        whole = ShardSpec.whole(name, reader.manifest.entries("weight", name)[0].piece.shard.global_shape)
        values = reader.read_local(whole, "weight").flatten()
        fragments += [Fragment(whole, "weight", 0, values), Fragment(whole, "ema", 0, 2 * values)]
    write_checkpoint(copy / "checkpoints", 5, fragments, {})
    export_model(copy, tmp_path / "last")
    assert export_model(copy, tmp_path / "averaged", averaged=True)["weights"] == "averaged"
    last, averaged = (_embedding(tmp_path / name) for name in ("last", "averaged"))
    assert torch.equal(averaged, 2 * last)


def _embedding(directory: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")["transformer.wte.weight"]


def llama_2_tokenizer() -> bytes:
    """Return a tokenizer that marks words by a character and falls back to bytes, as Llama 2's does."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256)), "\u2581", "a", "b", "\u2581a"]
    special = [
        {
            "id": number, "content": tokens[number], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
        for number in range(3)
    ]  # fmt: skip
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    decoders: list[Any] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
    ]
    decoders += [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "pre_tokenizer": None,
        "post_processor": None, "decoder": {"type": "Sequence", "decoders": decoders},
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)}, "merges": [["\u2581", "a"]],
        },
    }  # fmt: skip
    return json.dumps(content).encode()


def test_a_tokenizer_that_falls_back_to_bytes_is_taken() -> None:
    tokenizer = Tokenizer(llama_2_tokenizer())
    assert tokenizer.end_token == "</s>" and tokenizer.end_of_text == 2
    text = "a b\u00e9 a"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.byte_lengths[ids].sum()) == len(text.encode()) + 1  # the space in front
    (whole,) = tokenizer.encode_documents([text])
    assert whole.tolist() == ids


def test_a_tokenizer_comes_in_with_the_model(tmp_path: Path) -> None:
    values = {**values_of("llama"), "vocab_size": 300}
    source = make(tmp_path / "source", values)
    tokenizer = train_bpe(["north is not north, south is"] * 9, 280)
    tokenizer.save(source)
    import_model(source, tmp_path / "run")
    assert Tokenizer.load(tmp_path / "run").fingerprint == tokenizer.fingerprint
    small = make(tmp_path / "small", values_of("llama"))
    tokenizer.save(small)
    with pytest.raises(ConfigError, match=r"tokens, and the model has 67 \(vocab_size\)"):
        import_model(small, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_special_tokens_and_templates_go_out_as_they_came(tmp_path: Path) -> None:
    """A begin of text, several ends, a template for chats; none of them is known to megalm."""
    transformers = pytest.importorskip("transformers")
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0}
    source = make(tmp_path / "source", {**values_of("llama"), "vocab_size": 300, **ids})
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    about = {**special, "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {
        "tokenizer.json": llama_2_tokenizer(),
        "tokenizer_config.json": json.dumps(about, indent=7).encode(),
        "special_tokens_map.json": json.dumps(special).encode(),
        "generation_config.json": json.dumps({**ids, "do_sample": True, "top_k": 7}).encode(),
        "chat_template.jinja": "{{ messages[0]['content'] }} \u00e9\n".encode(),
    }
    for name, content in files.items():
        (source / name).write_bytes(content)
    import_model(source, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in ids} == ids
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False) == "a b \u00e9"
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)


def test_tokens_of_which_nothing_is_known_are_null(tmp_path: Path) -> None:
    """Not those of transformers' defaults, which are of GPT-2's, Llama's or Gemma's vocabulary."""
    transformers = pytest.importorskip("transformers")
    import_model(make(tmp_path / "source", values_of("gemma 2")), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "companions")  # as of a run of ours
    export_model(tmp_path / "run", tmp_path / "out")
    for kind in (transformers.AutoConfig, transformers.GenerationConfig):
        config = kind.from_pretrained(tmp_path / "out")
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_every_configuration_says_of_itself_which_family_it_is() -> None:
    assert {kind for kind, _ in CONFIGS.values()} == set(exporting.FAMILIES)
