"""The schema: defaults, derived values, and the rules between keys with their remedies."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from megalm.config.checks import divisors, list_values
from megalm.config.load import load_recipe
from megalm.config.run import ModelSection, RunConfig, check_world, key_fields
from megalm.errors import ConfigError
from tests.config.recipes import write_recipe


def load(folder: Path, *overrides: str) -> RunConfig:
    return load_recipe(write_recipe(folder), overrides)


def test_a_config_cannot_be_changed(tmp_path: Path) -> None:
    config = load(tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        config.model.layers = 2
    assert isinstance(hash(load(tmp_path, "parallel.partition=[4]")), int)


def test_derived_values_of_the_model() -> None:
    model = ModelSection(layers=1, hidden=512, heads=8, sequence=4)
    assert (model.head_size, model.key_value_heads, model.feed_forward) == (64, 8, 2048)
    swiglu = model.model_copy(update={"activation": "swiglu", "kv_heads": 2})
    assert (swiglu.key_value_heads, swiglu.feed_forward) == (2, 1408)  # 8/3 x 512 = 1365.3, up to 22 x 64
    assert model.model_copy(update={"ffn": 10}).feed_forward == 10


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tensor=8"], "model.heads=12 is not divisible by parallel.tensor=8; use 1, 2, 3, 4, 6 or 12"),
        (["model.heads=5"], "model.hidden=48 is not divisible by model.heads=5; use 1, 2, 3, 4, 6, 8, 12, 16, 24"),
        (["model.kv_heads=5"], "model.heads=12 is not divisible by model.kv_heads=5; use 1, 2, 3, 4, 6 or 12"),
        (
            ["model.kv_heads=2", "parallel.tensor=4"],
            "model.kv_heads=2 is not divisible by parallel.tensor=4; use 1 or 2",
        ),
        (
            ["model.ffn=10", "parallel.tensor=4"],
            "model.ffn=10 is not divisible by parallel.tensor=4; use 1, 2, 5 or 10",
        ),
        (
            ["model.position=rotary", "model.heads=16"],
            "a head has model.hidden/model.heads=3 of them with model.heads=16; use 1, 2, 3, 4, 6, 8, 12 or 24",
        ),
        (["parallel.pipeline=5"], "parallel.pipeline=5 is more than model.layers=4; use at most 4"),
        (
            ["parallel.pipeline=2", "parallel.partition=[1,2,1]"],
            "names 3 stages, but parallel.pipeline=2; give 2 numbers of layers that add up to 4",
        ),
        (
            ["parallel.pipeline=2", "parallel.partition=[1,2]"],
            "adds up to 3 layers, but model.layers=4; make the 2 numbers add up to 4",
        ),
        (
            ["parallel.sequence=true", "parallel.tensor=3"],
            "model.sequence=16 is not divisible by parallel.tensor=3; use 1, 2, 4, 8 or 16, or parallel.sequence=false",
        ),
        (
            ["train.micro_batch=5"],
            "train.global_batch=12 is not divisible by train.micro_batch=5; use 1, 2, 3, 4, 6 or 12",
        ),
        (
            ["parallel.context=3"],
            "model.sequence=16 does not divide into 2 x parallel.context=3 pieces, of which each rank has an early and "
            "a late one; use 12 or 18",
        ),
        (
            ["parallel.context=4", "parallel.tensor=4", "parallel.sequence=true", "model.sequence=24"],
            "model.sequence=24 is 6 tokens on each of parallel.context=4 ranks, which parallel.tensor=4 does not "
            "divide; use a multiple of 32, or parallel.sequence=false",
        ),
        (
            ["parallel.context=8", "parallel.context_attention=ulysses"],
            "divides the 12 heads of a tensor rank (model.heads=12 / parallel.tensor=1) over parallel.context=8, which "
            "does not go; use 1, 2, 3, 4, 6 or 12 for parallel.context, or parallel.context_attention=ring",
        ),
        (
            ["parallel.context=2", "model.flash_attention=false"],
            "model.flash_attention=false makes whole matrices of scores, which a ring never has; use "
            "parallel.context_attention=ulysses",
        ),
        (
            ["parallel.context=2", "model.attention_pattern=strided", "model.block_size=2", "model.local_blocks=2"],
            "model.attention_pattern=strided needs whole rows, which a ring never has; use "
            "parallel.context_attention=ulysses",
        ),
        (
            ["parallel.context=2", "train.compile=true"],
            "the messages of parallel.context=2 would part; use train.compile",
        ),
        (
            ["parallel.context_attention=ulysses"],
            "parallel.context_attention=ulysses has no effect without parallel.context above 1; leave it out",
        ),
        (
            ["overlap.gradients=true", "zero.stage=1"],
            "overlap.gradients=true does not work with zero.stage=1: DeepSpeed's stage 1 reduces gradients once, after "
            "the last microbatch, when nothing is computed any more; use zero.stage 0, 2 or 3, or overlap",
        ),
        (
            ["overlap.gradients=true", "zero.stage=2", "parallel.pipeline=2"],
            "message too, and would hang; use zero.stage=0, parallel.pipeline=1 or overlap.gradients=false",
        ),
        (
            ["overlap.tensor_chunks=100000", "parallel.tensor=2"],
            "overlap.tensor_chunks=100000 is more than the ",
        ),
        (
            ["overlap.tensor_chunks=2", "parallel.tensor=2", "train.compile=true"],
            "overlap.tensor_chunks=2 excludes train.compile=true: a compiled block waits for each collective where",
        ),
        (["zero.stage=3", "parallel.pipeline=2"], "use zero.stage 0, 1 or 2, or parallel.pipeline=1"),
        (["lr_schedule.warmup_steps=11"], "lr_schedule.warmup_steps=11 is more than train.steps=10; use at most 10"),
        (["train.stop_at=11"], "train.stop_at=11 is more than train.steps=10; use at most 10"),
        (["log.sinks=[wandb,wandb]"], "log.sinks=[wandb, wandb] names one twice; use [wandb]"),
        (
            ["profile.start=9"],
            "profile.start=9 with profile.steps=3 reaches to step 11, but the run ends at train.steps=10; use profile."
            "steps=2 at most",
        ),
        (["profile.start=5", "train.stop_at=4"], "the run ends at train.stop_at=4; use profile.start=4 at most"),
        (["profile.memory_at=11"], "profile.memory_at=11 is a step behind the last one, 10; use at most 10"),
        (["inspect.every=11"], "inspect.every=11 is more than train.steps=10, so nothing is sampled; use at most 10"),
        (["optim.momentum=0.9"], "optim.momentum=0.9 has no effect without optim.kind=sgd or rmsprop; leave it out"),
    ],
)
def test_a_broken_rule_gives_the_values_and_the_legal_ones(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("command line: ")


def test_legal_layouts_are_accepted(tmp_path: Path) -> None:
    config = load(
        tmp_path, "parallel.tensor=2", "parallel.pipeline=3", "parallel.partition=[1,2,1]", "parallel.sequence=true"
    )
    assert config.parallel.partition == (1, 2, 1)
    assert load(tmp_path, "zero.stage=3", "parallel.tensor=4").zero.stage == 3


def test_building_a_config_in_code_checks_the_rules_too() -> None:
    values = {
        "model": {"layers": 1, "hidden": 8, "heads": 3, "sequence": 4},
        "train": {"steps": 1, "global_batch": 2, "micro_batch": 1},
        "optim": {"lr": 1.0},
    }
    with pytest.raises(ConfigError, match=r"model\.hidden=8 is not divisible by model.heads=3"):
        RunConfig.model_validate(values)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.kv_heads=2"], "model.kv_heads=2 does not go with latent attention (model.kv_rank=8), which makes"),
        (["model.head_dim=8"], "whose heads have two parts; use rope_head_dim and nope_head_dim"),
        (["model.position=rotary", "model.rotary_share=0.5"], "model.rotary_share=0.5 does not go with latent"),
        (["model.qk_norm=true"], "whose norms are those of the latents; use model.qk_norm=false"),
        (["model.attention_gate=true"], "whose projections have no gates; use model.attention_gate=false"),
        (["model.qkv_bias=true"], "whose projections have no biases; leave it out"),
        (["model.qkv_bias=false"], "model.qkv_bias=false does not go with latent attention"),
        (["model.position=rotary", "model.rope_head_dim=5"], "model.rope_head_dim=5 is odd, and model.position=rot"),
        (["model.nope_head_dim=8", "model.value_head_dim=13"], "model.value_head_dim=13 is more than the 12 features"),
    ],
)
def test_latent_attention_excludes_what_has_no_meaning_there(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "model.kv_rank=8", *overrides)
    assert message in str(caught.value)


def test_further_tokens_lie_within_a_row(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.mtp_depth=16 predicts tokens that no row .*; use less than 16"):
        load(tmp_path, "model.mtp_depth=16", "model.sequence=16")


def test_check_world_returns_the_data_parallel_size(tmp_path: Path) -> None:
    config = load(tmp_path, "parallel.tensor=2", "parallel.pipeline=2")
    assert [check_world(config, world) for world in (4, 8, 12)] == [1, 2, 3]
    divided = load(tmp_path, "parallel.tensor=2", "parallel.context=2")
    assert [check_world(divided, world) for world in (4, 8, 12)] == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"parallel\.tensor=2 x .* x parallel\.context=2 needs 4 ranks"):
        check_world(divided, 3)
    padded = load(tmp_path, "train.pad_batch=true", "train.micro_batch=5")
    assert [check_world(padded, world) for world in (1, 7, 64)] == [1, 7, 64]


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (2, "parallel.tensor=2 x parallel.pipeline=2 needs 4 ranks, but 2 are started; start 4"),
        (1, "needs 4 ranks, but 1 is started"),
        (6, "6 ranks are not divisible by .*; start 4 or 8"),
        (
            16,
            "train.global_batch=12 is not divisible by train.micro_batch=2 x 4 data-parallel ranks .* "
            "use 8 or 16 for train.global_batch, or 4, 8, 12 or 24 ranks, or train.pad_batch=true",
        ),
    ],
)
def test_check_world_refuses_ranks_that_do_not_fit(tmp_path: Path, world: int, message: str) -> None:
    config = load(tmp_path, "parallel.tensor=2", "parallel.pipeline=2")
    with pytest.raises(ConfigError, match=message):
        check_world(config, world)


def test_divisors_and_their_list() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]
    assert list_values([7]) == "7"
    assert list_values([1, 2]) == "1 or 2"
    assert list_values(list(range(1, 21))) == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, ... or 20"


def test_every_key_has_a_declaration() -> None:
    fields = key_fields()
    assert {"seed", "precision", "run.dir", "model.kv_heads", "log.every"} <= fields.keys()
    sections = load_recipe("gpt-tiny").model_dump().items()
    paths = [[f"{name}.{key}" for key in value] if isinstance(value, dict) else [name] for name, value in sections]
    assert fields.keys() == {path for found in paths for path in found}


@pytest.mark.parametrize(
    "override",
    [
        *("model.rotary_share=0.5", "model.relative_buckets=8", "model.window_pattern=SL", "model.nope_every=2"),
        *("optim.muon_momentum=0.9", "optim.muon_nesterov=false", "optim.muon_ns_steps=6", "optim.adamw_lr=0.1"),
        *("optim.muon_adjust_lr_fn=original", "optim.alpha=0.9", "optim.nesterov=true", "lr_schedule.factor=0.5"),
        *("profile.steps=5", "profile.ranks=[1]", "profile.memory=true"),
        *("overlap.tensor_chunks=2", "overlap.messages=false"),
        *("lr_schedule.cooldown_shape=sqrt", "train.recompute_every=2"),
        *("loss.mtp=0.1", "model.q_rank=8", "model.rope_head_dim=8", "model.nope_head_dim=8", "model.value_head_dim=8"),
    ],
)
def test_a_key_without_effect_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=f"^.*{override.split('=')[0]}=.* has no effect without .*; leave it out"):
        load(tmp_path, override)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("[{lr: 1.0}]", r"optim\.rules\[0\]\.match: missing"),
        ("[{match: a, lrr: 1.0}]", r"optim\.rules\[0\]\.lrr: unknown key"),
        ("[{match: a}, {match: b, lr: -1.0}]", r"optim\.rules\[1\]\.lr=-1.0 is too small; use at least 0"),
    ],
)
def test_a_wrong_rule_of_the_optimizer_is_named(tmp_path: Path, rules: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, f"optim.rules={rules}")
