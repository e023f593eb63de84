"""The DeepSpeed JSON and the recipe: what is joined, and every contradiction between them."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from megalm.cli import main
from megalm.config.deepspeed import deepspeed_config
from megalm.config.deepspeed_files import about_configs, shipped_configs
from megalm.config.deepspeed_keys import COUNTS, FLAGS, REFUSED, ZERO_KEYS
from megalm.config.load import load_recipe
from megalm.config.run import RunConfig
from megalm.errors import ConfigError
from tests.config.recipes import write_recipe


def config_with(folder: Path, content: dict[str, Any] | str, *overrides: str) -> RunConfig:
    """Return the small recipe with a DeepSpeed JSON of the user's own."""
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return load_recipe(write_recipe(folder), [f"zero.config={path}", *overrides])


def error_of(config: RunConfig, data_size: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(config, data_size)
    return str(caught.value)


def stages() -> list[tuple[str, int]]:
    """Return every shipped file's name with each of the stages that it is for."""
    found = []
    for name, path in shipped_configs().items():
        stage = json.loads(path.read_text())["zero_optimization"]["stage"]
        found += [(name, each) for each in ([1, 2, 3] if stage == "auto" else [stage])]
    return found


def joined_of(folder: Path, name: str, stage: int) -> dict[str, Any]:
    """Return a shipped file joined with a small recipe of the stage."""
    overrides = [f"zero.stage={stage}", f"zero.config={name}", "precision=bf16"]
    return deepspeed_config(load_recipe(write_recipe(folder), overrides))


@pytest.mark.parametrize(("name", "stage"), stages())
def test_shipped_files_join_with_a_recipe_of_their_stage(tmp_path: Path, name: str, stage: int) -> None:
    zero = joined_of(tmp_path, name, stage)["zero_optimization"]
    assert zero["stage"] == stage and (not name.startswith("zero") or int(name[4]) == stage)
    assert zero["overlap_comm"] is False  # said in any case: DeepSpeed's stage 3 would overlap by default
    assert ("offload_optimizer" in zero) == name.endswith("offload")


@pytest.mark.parametrize(("name", "stage"), stages())
def test_deepspeeds_own_parser_takes_every_shipped_file(tmp_path: Path, name: str, stage: int) -> None:
    joined = joined_of(tmp_path, name, stage)
    parsed = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig(joined)
    assert parsed.bfloat16_config.enabled
    assert parsed.bfloat16_config.bf16_master_weights_and_grads == (name == "low-memory-bf16")
    assert parsed.comms_config.comms_logger_enabled == (name == "profiling")
    understood = parsed.zero_config.model_dump(by_alias=True, mode="json")
    for key, value in joined["zero_optimization"].items():
        wanted = value.items() if isinstance(value, dict) else [(None, value)]
        for inner, each in wanted:
            assert (understood[key] if inner is None else understood[key][inner]) == each, (key, inner)


def test_every_shipped_file_says_when_to_take_it() -> None:
    abouts = about_configs()
    assert abouts.keys() == shipped_configs().keys() and len(set(abouts.values())) == len(abouts)
    assert all(about.endswith(".") and len(about) > 40 for about in abouts.values())


def test_the_documentation_lists_every_shipped_file() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
    items = text[text.index("The files of `zero.config`:\n\n- ") :].split("\n\n")[1]
    names = [re.findall(r"`([^`]+)`", line.partition(":")[0]) for line in items.splitlines() if line.startswith("- ")]
    assert sorted(chain.from_iterable(names)) == sorted(shipped_configs())


def test_the_stage_names_the_file_by_default(tmp_path: Path) -> None:
    joined = deepspeed_config(load_recipe(write_recipe(tmp_path), ["zero.stage=2", "train.clip_grad_norm=0.5"]))
    assert joined.pop("zero_optimization")["reduce_bucket_size"] == 50_000_000
    assert joined == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def test_bf16_accumulates_in_fp32_and_no_clipping_is_zero(tmp_path: Path) -> None:
    overrides = ["precision=bf16", "train.clip_grad_norm=null"]
    joined = deepspeed_config(load_recipe(write_recipe(tmp_path), overrides))
    assert joined["bf16"] == {"enabled": True}
    assert joined["data_types"] == {"grad_accum_dtype": "fp32"}
    assert joined["gradient_clipping"] == 0.0


def test_values_equal_to_the_recipe_and_auto_are_accepted(tmp_path: Path) -> None:
    content = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 1,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.95], "eps": "auto"}},
        "scheduler": "auto",
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 7},
        "communication_data_type": "fp32",
        "steps_per_print": 5,
        "dump_state": False,
        "wall_clock_breakdown": False,
        "flops_profiler": {"enabled": False, "profile_step": 1},
        "comms_logger": {"enabled": False},
    }
    joined = deepspeed_config(
        config_with(tmp_path, content, "precision=bf16", "zero.stage=1", "log.every=5"), data_size=2
    )
    assert joined["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 7, "overlap_comm": False}
    assert joined["steps_per_print"] == 10**9 and joined["wall_clock_breakdown"] is False
    assert joined["gradient_accumulation_steps"] == joined["train_micro_batch_size_per_gpu"] == 1
    assert not {"optimizer", "scheduler", "fp16", "train_batch_size", "flops_profiler", "comms_logger"} & joined.keys()


def test_clipping_of_zero_is_no_clipping(tmp_path: Path) -> None:
    config = config_with(tmp_path, {"gradient_clipping": 0.0}, "train.clip_grad_norm=null")
    assert deepspeed_config(config)["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("content", "place", "recipe"),
    [
        ({"train_batch_size": 32}, "train_batch_size=32", "train.global_batch=12"),
        ({"train_batch_size": True}, "train_batch_size=true", "train.global_batch=12"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu=4", "train.micro_batch=2"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4", "train.global_batch=12 and train.micro"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5", "train.clip_grad_norm=1.0"),
        ({"gradient_clipping": 0.0}, "gradient_clipping=0.0", "train.clip_grad_norm=1.0"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=true", "precision=fp32"),
        ({"fp16": {"enabled": "yes"}}, 'fp16.enabled="yes"', "precision=fp32"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=true", "precision=fp32"),
        ({"amp": {"enabled": True}}, "amp.enabled=true", "precision=fp32"),
        ({"communication_data_type": "fp16"}, 'communication_data_type="fp16"', 'train.reduce_dtype="fp32"'),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 'data_types.grad_accum_dtype="bf16"', "precision=fp32"),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type="Lamb"', "optim.kind=adamw"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "optimizer.params.lr=1", "optim.lr=0.001"),
        ({"optimizer": {"params": {"torch_adam": True}}}, "optimizer.params.torch_adam=true", "optim.kind=adamw"),
        ({"scheduler": {"type": "WarmupLR"}}, 'scheduler.type="WarmupLR"', "lr_schedule.kind=cosine"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage=2", "zero.stage=1"),
        ({"steps_per_print": 3}, "steps_per_print=3", "log.every=1"),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer=true", "optim.kind=adamw"),
    ],
)  # fmt: skip
def test_a_contradiction_names_both_places(tmp_path: Path, content: dict[str, Any], place: str, recipe: str) -> None:
    error = error_of(config_with(tmp_path, content, "zero.stage=1"))
    assert f"mine.json:{place}" in error or f"mine.json:zero_optimization.{place}" in error
    assert f"contradicts the recipe's {recipe}" in error
    assert "\n" not in error


def test_all_contradictions_are_reported_at_once(tmp_path: Path) -> None:
    content = {"train_batch_size": 32, "gradient_clipping": 2, "fp16": {"enabled": True}}
    lines = error_of(config_with(tmp_path, content)).splitlines()
    assert lines[0] == "mine.json: 3 mistakes"
    assert len(lines) == 4


def test_precision_switched_off_contradicts_bf16(tmp_path: Path) -> None:
    error = error_of(config_with(tmp_path, {"bf16": {"enabled": False}}, "precision=bf16"))
    assert "mine.json:bf16.enabled=false contradicts the recipe's precision=bf16" in error


def test_accumulation_is_compared_exactly_once_the_data_ranks_are_known(tmp_path: Path) -> None:
    config = config_with(tmp_path, {"gradient_accumulation_steps": 3})
    assert deepspeed_config(config, data_size=2)
    assert "over 3 data-parallel ranks" in error_of(config, data_size=3)


@pytest.mark.parametrize("stage", [2, 3])
def test_overlapped_communication_is_the_recipe_s(tmp_path: Path, stage: int) -> None:
    overlap = (f"zero.stage={stage}", "overlap.gradients=true")
    for content in ({}, {"zero_optimization": {"overlap_comm": True}}):
        assert deepspeed_config(config_with(tmp_path, content, *overlap))["zero_optimization"]["overlap_comm"] is True
    error = error_of(config_with(tmp_path, {"zero_optimization": {"overlap_comm": False}}, *overlap))
    assert "overlap_comm=false contradicts the recipe's overlap.gradients=true" in error
    error = error_of(config_with(tmp_path, {"zero_optimization": {"overlap_comm": True}}, overlap[0]))
    assert "overlap_comm=true contradicts the recipe's overlap.gradients=false" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimisation": {}}, "mine.json:zero_optimisation: unknown key; did you mean zero_optimization?"),
        ({"zero_optimization": {"reduce_bucket": 1}}, "reduce_bucket: unknown key; did you mean reduce_bucket_size?"),
        ({"tensorboard": {}}, "mine.json:tensorboard: unknown key; it would have no effect here, take it out"),
        ({"disable_allgather": True}, "disable_allgather=true: DeepSpeed 0.19.8 reads it and does nothing with it; t"),
        ({"dump_state": True}, "dump_state=true: what it prints goes to a log that megalm keeps quiet; use megalm con"),
        ({"flops_profiler": {"enabled": True}}, "it counts torch's functions on rank 0, so neither fused kernels"),
        ({"memory_breakdown": True}, "it knows nothing of the backward pass, which DeepSpeed does not run"),
        ({"wall_clock_breakdown": True}, "wall_clock_breakdown=true: it gives 0.00 ms for the backward pass"),
        ({"log_level": "loud"}, 'log_level="loud" is no level; use debug, info, warning, error, critical'),
        ({"disable_python_gc": 1}, "disable_python_gc=1 is no flag; write true or false"),
        ({"comms_logger": True}, "comms_logger=true is not an object; write {...}"),
        ({"comms_logger": {"debug": True}}, 'comms_logger={"debug": true} does not say whether; write "enabled": t'),
        ({"comms_logger": {"enabled": 1}}, "comms_logger.enabled=1 is no flag; write true or false"),
        ({"comms_logger": {"enabled": True, "verbose": True}}, "verbose=true: a line for each call would drown the r"),
        ({"comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]}}, "the table has every call; take it out"),
        ({"comms_logger": {"enabled": True, "prof": 1}}, "comms_logger.prof=1 is an unknown key; DeepSpeed 0.19.8 h"),
        ({"fp16": True}, "mine.json:fp16=true is not an object"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, 'offload_optimizer="cpu" is not an object'),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, 'reduce_bucket_size="big" is no size; write a whole'),
        ({"zero_optimization": {"sub_group_size": 0}}, "sub_group_size=0 is no size; write a whole number from 1 on"),
        ({"zero_optimization": {"sub_group_size": True}}, "sub_group_size=true is no size"),
        ({"zero_optimization": {"reduce_scatter": "auto"}}, 'reduce_scatter="auto" is no flag; write true or false'),
        ({"zero_optimization": {"round_robin_gradients": 1}}, "round_robin_gradients=1 is no flag"),
        ('{\n "fp16": {,}\n}', "mine.json:2: not valid JSON"),
        ("", "mine.json:1: not valid JSON"),
        ("[1]", "mine.json: not an object"),
        ('{"fp16": {}, "fp16": {}}', "mine.json: key fp16 is given twice"),
        ('{"gradient_clipping": NaN}', "mine.json: NaN is no JSON"),
        ("[" * 100_000, "mine.json: values are nested too deeply"),
    ],
)  # fmt: skip
def test_a_json_that_is_wrong_in_itself_is_one_line(tmp_path: Path, content: Any, message: str) -> None:
    error = error_of(config_with(tmp_path, content, "zero.stage=1"))
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero4", "zero.config=zero4: no shipped DeepSpeed JSON; did you mean zero"),
        (
            "zero3-nvme",
            "no shipped DeepSpeed JSON, as DeepSpeed moves what is offloaded there into files and leaves empty tensors",
        ),
        ("zenflow", "as ZenFlow keeps gradients back over several updates"),
        (
            "super_offload",
            "as SuperOffload keeps the optimizer's state in a process of its own, where no checkpoint rea",
        ),
        ("zero++", "whole of ZeRO++ is refused: DeepSpeed's kernel reads any gradient as fp16"),
        ("gone.json", "zero.config=gone.json: no such file; give a JSON file or one of low-memory-bf16, "),
    ],
)
def test_an_unknown_file_lists_the_known_ones(tmp_path: Path, name: str, message: str) -> None:
    assert message in error_of(load_recipe(write_recipe(tmp_path), [f"zero.config={name}"]))


def test_the_known_zero_keys_are_those_of_the_pinned_deepspeed() -> None:
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    assert version("deepspeed") == "0.19.8"
    fields = config.DeepSpeedZeroConfig.model_fields
    names = {field.alias or name for name, field in fields.items()} | fields.keys()
    assert names >= ZERO_KEYS
    assert {field.alias or name for name, field in fields.items()} == ZERO_KEYS
    assert not FLAGS & COUNTS and FLAGS | COUNTS | REFUSED.keys() | {"stage", "offload_optimizer"} == ZERO_KEYS


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "zero_optimization.offload_param"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "tape"}}},
            "zero_optimization.offload_optimizer.device",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "zero_optimization.offload_optimizer.ratio",
        ),
        ({"zero_optimization": {"compute_grad_norm": False}}, "zero_optimization.compute_grad_norm"),
        ({"zero_optimization": {"legacy_stage1": True}}, "zero_optimization.legacy_stage1"),
        ({"zero_optimization": {"parameter_alignment": 8}}, "zero_optimization.parameter_alignment"),
        (
            {"zero_optimization": {"stage3_module_granularity_threshold": 100000}},
            "zero_optimization.stage3_module_granularity_threshold",
        ),
        ({"zero_optimization": {"overlap_comm": True}}, "zero_optimization.overlap_comm"),
        ({"communication_data_type": "fp16"}, "communication_data_type"),
    ],
)
def test_what_no_layout_is_gated_with_is_refused(tmp_path: Path, content: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"mine.json:{key}")):
        deepspeed_config(config_with(tmp_path, content, "zero.stage=1"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"zenflow": {"topk_ratio": 0.1}}, 'zenflow={"topk_ratio": 0.1}: ZenFlow keeps gradients back over several'),
        ({"zero_quantized_gradients": True}, "zero_quantized_gradients=true: DeepSpeed's kernel reads any gradient as"),
        ({"zero_quantized_nontrainable_weights": True}, "no layout with it is held to the one-process reference; t"),
        (
            {"offload_optimizer": {"device": "cpu", "super_offload": True}},
            "offload_optimizer.super_offload=true: SuperOffload keeps the optimizer's state in a process of its own",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(tmp_path: Path, content: dict[str, Any], reason: str) -> None:
    error = error_of(config_with(tmp_path, {"zero_optimization": content}, "zero.stage=3"))
    assert reason in error and "\n" not in error


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        (
            {"zero_hpz_partition_size": 2},
            ["zero.stage=2"],
            "zero_hpz_partition_size=2 contradicts the recipe's zero.st",
        ),
        (
            {"zero_hpz_partition_size": 4},
            ["zero.stage=3"],
            "=4 does not divide the 6 ranks that hold the same layers; use",
        ),
        ({"zero_hpz_partition_size": 0}, ["zero.stage=3"], "zero_hpz_partition_size=0 is no size"),
        ({"zero_quantized_weights": True}, ["zero.stage=1"], "set zero.stage=3; other stages have whole weights"),
        ({"zero_quantized_weights": 1}, ["zero.stage=3"], "zero_quantized_weights=1 is no flag"),
        (
            {"zero_quantized_weights": True},
            ["zero.stage=3", "run.device=cpu"],
            "contradicts the recipe's run.device=cpu",
        ),
    ],
)
def test_parts_of_zero_plus_plus_that_fit_nothing(
    tmp_path: Path, content: dict[str, Any], overrides: list[str], message: str
) -> None:
    error = error_of(config_with(tmp_path, {"zero_optimization": content}, *overrides), data_size=6)
    assert message in error and "\n" not in error


@pytest.mark.parametrize(
    ("flags", "overrides", "message"),
    [
        ([True, True], ["zero.stage=1"], "bf16.bf16_optimizer_states=true contradicts the recipe's precision=fp32"),
        ([True, True], ["precision=bf16"], "contradicts the recipe's zero.stage=0; set zero.stage to 1, 2 or 3"),
        (
            [True, False],
            ["precision=bf16", "zero.stage=1"],
            "needs bf16.bf16_optimizer_states=true beside it; set both",
        ),
        ([False, True], ["precision=bf16", "zero.stage=1"], "needs bf16.bf16_master_weights_and_grads=true beside it"),
        ([True, 1], ["precision=bf16", "zero.stage=1"], "bf16_optimizer_states=1 is no flag; write true or false"),
    ],
)
def test_states_in_bf16_that_fit_nothing(tmp_path: Path, flags: list[Any], overrides: list[str], message: str) -> None:
    names = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
    content = {"bf16": {"enabled": "auto", **dict(zip(names, flags, strict=True))}}
    assert message in error_of(config_with(tmp_path, content, *overrides))


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_offload_to_nvme_is_one_line_with_the_reason(tmp_path: Path, part: str) -> None:
    content = {"zero_optimization": {part: {"device": "nvme", "nvme_path": "/scratch", "buffer_count": 4}}}
    error = error_of(config_with(tmp_path, content, "zero.stage=3"))
    assert "DeepSpeed moves what is offloaded there into files and leaves empty tensors" in error and "\n" not in error


def test_what_is_offloaded_to_nvme_is_an_empty_tensor() -> None:
    """That is why it is refused: once this fails, checkpoints may be able to read it."""
    swapping = pytest.importorskip("deepspeed.runtime.swap_tensor.optimizer_utils")
    master = pytest.importorskip("torch").ones(8)
    master.ds_id = 1
    swapping.OptimizerStateSwapInfo(master, 8, "/nowhere", None).release_memory()
    assert master.numel() == 0


@pytest.mark.parametrize("content", [{"comms_logger": {"enabled": True}}, {"log_level": "info"}])
def test_what_watches_deepspeed_is_refused_without_it(tmp_path: Path, content: dict[str, Any]) -> None:
    assert "contradicts the recipe's zero.stage=0; set zero.stage to 1, 2 or 3" in error_of(
        config_with(tmp_path, content)
    )
    (key, value), joined = *content.items(), deepspeed_config(config_with(tmp_path, content, "zero.stage=1"))
    assert joined[key] == value


def test_states_in_bf16_are_not_offloaded(tmp_path: Path) -> None:
    bf16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    content = {"bf16": bf16, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    error = error_of(config_with(tmp_path, content, "precision=bf16", "zero.stage=2"))
    assert "DeepSpeed's own Adam alone keeps bf16 states in the host's memory; take it out" in error


@pytest.mark.parametrize("key", ["contiguous_gradients", "reduce_scatter"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_reduction_that_knows_one_group_is_refused_where_ranks_divide_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: int, key: str
) -> None:
    content, chosen = {"zero_optimization": {key: False}}, [f"zero.stage={stage}", "model.experts=4"]
    assert deepspeed_config(config_with(tmp_path, content, *chosen))
    divided = [*chosen, "parallel.expert=2", "model.vocab=64", f"zero.config={tmp_path / 'mine.json'}"]
    wrong = f"mine.json:zero_optimization.{key}=false contradicts the recipe's parallel.expert=2; without it "
    for command in (["config", "show"], ["train", "--dry-run=0/2"]):
        assert main([*command, str(tmp_path / "recipe.yaml"), *divided]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"error: {wrong}") and said.err.endswith("; take it out\n") and not said.out
