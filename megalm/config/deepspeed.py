"""Joins a DeepSpeed JSON with the recipe into the dict that DeepSpeed is started with.

The JSON owns ZeRO, offload and communication; the recipe owns batch sizes, clipping, precision, optimizer and
schedule. A JSON that says something else than the recipe is refused with both places named; the same value or
DeepSpeed's "auto" is accepted. Imports neither torch nor deepspeed, so a login node can check it.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from megalm.config.checks import report
from megalm.config.run import RunConfig
from megalm.errors import ConfigError
from megalm.files import require_regular
from megalm.registry import nearest, unknown_name

NEVER = 10**9
AUTO = "auto"
# fmt: off
# DeepSpeed 0.19.8, runtime/zero/config.py; a test holds these equal to the installed package's.
ZERO_KEYS = frozenset({
    "allgather_bucket_size", "allgather_partitions", "compute_grad_norm", "contiguous_gradients",
    "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint",
    "enable_sanity_checks", "ignore_unused_parameters", "leaf_module", "legacy_stage1",
    "load_from_fp32_weights", "log_trace_cache_warnings", "memory_efficient_linear",
    "offload_optimizer", "offload_param", "overlap_comm", "override_module_apply",
    "parameter_alignment", "pipeline_loading_checkpoint", "reduce_bucket_size", "reduce_scatter",
    "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage",
    "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params", "sub_group_size",
    "use_multi_rank_bucket_allreduce", "zenflow", "zero_hpz_partition_size", "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights", "zero_quantized_weights",
})
# What would change the arithmetic, or break it, and no layout of the parity gate has is refused.
NOT_GATED = frozenset({
    "cpu_offload", "cpu_offload_param", "leaf_module", "offload_param", "parameter_alignment",
    "stage3_module_granularity_threshold", "zenflow", "zero_hpz_partition_size",
    "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights",
})
FLAGS = frozenset({
    "allgather_partitions", "compute_grad_norm", "contiguous_gradients", "cpu_offload_use_pin_memory",
    "elastic_checkpoint", "enable_sanity_checks", "ignore_unused_parameters", "legacy_stage1",
    "load_from_fp32_weights", "log_trace_cache_warnings", "memory_efficient_linear", "overlap_comm",
    "override_module_apply", "pipeline_loading_checkpoint", "reduce_scatter", "round_robin_gradients",
    "save_muon_momentum_buffer_in_memory", "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
    "stage3_use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce",
})
COUNTS = frozenset({
    "allgather_bucket_size", "reduce_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
    "sub_group_size",
})
OFFLOAD_KEYS = frozenset({"device", "pin_memory"})
PASSED_ON = frozenset({
    "comms_logger", "disable_allgather", "disable_python_gc",
    "dump_state", "log_level", "memory_breakdown", "steps_per_print", "wall_clock_breakdown",
    "zero_optimization",
})
CHECKED = frozenset({
    "amp", "bf16", "bfloat16", "communication_data_type", "data_types", "fp16", "gradient_accumulation_steps",
    "gradient_clipping", "optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
})
# fmt: on


class _Json(NamedTuple):
    """A DeepSpeed JSON, the file name that errors give, and the contradictions found in it so far."""

    name: str
    values: dict[str, Any]
    problems: list[str]

    def contradiction(self, key: str, value: Any, recipe: str, remedy: str) -> None:
        self.problems.append(f"{self.name}:{key}={json.dumps(value)[:60]} contradicts the recipe's {recipe}; {remedy}")

    def compare(self, key: str, value: Any, recipe_key: str, recipe_value: Any) -> None:
        """Note a contradiction unless the JSON's value is absent, "auto", or equal to the recipe's."""
        if value is None or value == AUTO or _equal(value, recipe_value):
            return
        recipe = f"{recipe_key}={json.dumps(recipe_value)}"
        self.contradiction(key, value, recipe, f"take {key} out of the JSON and set {recipe_key}")

    def section(self, key: str) -> dict[str, Any]:
        """Return the object at a top-level key, {} where there is none; note anything else."""
        value = self.values.get(key)
        if value is None or value == AUTO:
            return {}
        if not isinstance(value, dict):
            self.problems.append(f"{self.name}:{key}={json.dumps(value)[:60]} is not an object; write {{...}}")
            return {}
        return value


def _equal(value: Any, other: Any) -> bool:
    """Compare as JSON does, where 1 is 1.0 but not true."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_equal, value, other))
    return bool(value == other)


def shipped_configs() -> dict[str, Path]:
    """Return the file of each DeepSpeed JSON that comes with megalm, by name."""
    folder = Path(str(resources.files("megalm.ds_configs").joinpath("zero0.json"))).parent
    return {path.stem: path for path in sorted(folder.glob("*.json"), key=lambda path: path.stem)}


def _find(name_or_path: str) -> Path:
    shipped = shipped_configs()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    if "/" in name_or_path or name_or_path.endswith(".json"):
        raise ConfigError(f"zero.config={name_or_path}: no such file; give a JSON file or one of {', '.join(shipped)}")
    raise ConfigError(f"zero.config={name_or_path}: no shipped DeepSpeed JSON; {unknown_name(name_or_path, shipped)}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs. Raises ValueError for a key that is given twice."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key} is given twice; keep one of them")
        values[key] = value
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write a number")


def _read(path: Path) -> dict[str, Any]:
    """Return the object that the file holds. Raises ConfigError with the line where it is not JSON."""
    try:
        require_regular(path)
        text = path.read_bytes().decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a readable JSON file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start}); give a JSON file") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}; check commas and quotes") from error
    except (ValueError, RecursionError) as error:
        reason = "values are nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{path}: {reason}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not an object; write {{...}} with keys such as zero_optimization")
    return value


def deepspeed_config(config: RunConfig, data_size: int | None = None) -> dict[str, Any]:
    """Return the dict for `deepspeed.initialize`: the JSON that `zero.config` names, joined with the recipe.

    The engine is given a batch of one and no accumulation, because the schedule runs the microbatches and
    scales the loss itself. With `data_size` (ranks on the data axis) an accumulation in the JSON is compared
    exactly. Raises one ConfigError with every contradiction.
    """
    path = _find(config.zero.config or f"zero{config.zero.stage}")
    given = _Json(path.name, _read(path), [])
    _check_keys(given)
    _check_batches(given, config, data_size)
    _check_precision(given, config)
    _check_optimizer(given, config)
    _check_zero(given, config)
    if given.problems:
        raise ConfigError(report(given.problems, given.name))
    joined: dict[str, Any] = {"steps_per_print": NEVER, "wall_clock_breakdown": False}
    joined |= {key: value for key, value in given.values.items() if key in PASSED_ON}
    joined |= {
        "zero_optimization": {**given.section("zero_optimization"), "stage": config.zero.stage},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.clip_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.precision == "bf16":
        joined |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return joined


def _check_keys(given: _Json) -> None:
    """Note keys that DeepSpeed would silently pass over, or that drive parts which megalm does not use."""
    for key in given.values.keys() - PASSED_ON - CHECKED:
        guess = nearest(key, PASSED_ON | CHECKED)
        remedy = f"did you mean {guess}?" if guess else "it would have no effect here, take it out"
        given.problems.append(f"{given.name}:{key}: unknown key; {remedy}")
    for key in given.section("zero_optimization").keys() - ZERO_KEYS:
        guess = nearest(key, ZERO_KEYS)
        remedy = f"did you mean {guess}?" if guess else "DeepSpeed 0.19.8 has none such, take it out"
        given.problems.append(f"{given.name}:zero_optimization.{key}: unknown key; {remedy}")
    given.problems.sort()


def _check_batches(given: _Json, config: RunConfig, data_size: int | None) -> None:
    train, values = config.train, given.values
    given.compare("train_batch_size", values.get("train_batch_size"), "train.global_batch", train.global_batch)
    micro = values.get("train_micro_batch_size_per_gpu")
    given.compare("train_micro_batch_size_per_gpu", micro, "train.micro_batch", train.micro_batch)
    steps = values.get("gradient_accumulation_steps")
    if steps is not None and steps != AUTO:
        microbatches = train.global_batch // train.micro_batch
        whole = isinstance(steps, int) and not isinstance(steps, bool) and steps > 0
        if not whole or microbatches % steps or (data_size is not None and steps * data_size != microbatches):
            over = f" over {data_size} data-parallel ranks" if data_size else ""
            recipe = f"train.global_batch={train.global_batch} and train.micro_batch={train.micro_batch}{over}"
            remedy = "take gradient_accumulation_steps out of the JSON; it follows from the two"
            given.contradiction("gradient_accumulation_steps", steps, recipe, remedy)
    clip = values.get("gradient_clipping")
    if not (train.clip_grad_norm is None and _equal(clip, 0)):
        given.compare("gradient_clipping", clip, "train.clip_grad_norm", train.clip_grad_norm)


def _check_precision(given: _Json, config: RunConfig) -> None:
    recipe = f"precision={config.precision}"
    for key, precision in (("fp16", "fp16"), ("amp", "amp"), ("bf16", "bf16"), ("bfloat16", "bf16")):
        section = given.section(key)
        enabled = section.get("enabled", AUTO if not section else False)
        wanted = config.precision == precision
        if enabled != AUTO and enabled is not wanted:
            remedy = f"take {key} out of the JSON and set precision"
            given.contradiction(f"{key}.enabled", enabled, recipe, remedy)
        for extra in section.keys() - {"enabled"}:
            if wanted:
                remedy = "take it out; precision in the recipe decides the whole of it"
                given.contradiction(f"{key}.{extra}", section[extra], recipe, remedy)
    accumulate = "fp64" if config.precision == "fp64" else "fp32"
    travels = given.values.get("communication_data_type")
    if travels not in (AUTO, None, accumulate):
        remedy = f"take it out; gradients travel in {accumulate}"
        given.contradiction("communication_data_type", travels, recipe, remedy)
    for key, value in given.section("data_types").items():
        if value not in (AUTO, None) and (key, value) != ("grad_accum_dtype", accumulate):
            remedy = f"take it out; gradients accumulate in {accumulate}"
            given.contradiction(f"data_types.{key}", value, recipe, remedy)


def _check_optimizer(given: _Json, config: RunConfig) -> None:
    optimizer = given.section("optimizer")
    kind = optimizer.get("type")
    if kind not in (None, AUTO) and (not isinstance(kind, str) or kind.lower() != config.optim.kind):
        remedy = "take optimizer out of the JSON and set optim.kind"
        given.contradiction("optimizer.type", kind, f"optim.kind={config.optim.kind}", remedy)
    params = optimizer.get("params")
    known = config.optim.model_dump(mode="json", exclude={"kind"})
    for key, value in (params if isinstance(params, dict) else {}).items():
        if key in known:
            given.compare(f"optimizer.params.{key}", value, f"optim.{key}", known[key])
        elif value != AUTO:
            remedy = f"take it out; optim has {', '.join(known)}"
            given.contradiction(f"optimizer.params.{key}", value, f"optim.kind={config.optim.kind}", remedy)
    scheduler = given.section("scheduler")
    if scheduler.get("type") not in (None, AUTO):
        remedy = "take scheduler out of the JSON and set lr_schedule"
        recipe = f"lr_schedule.kind={config.lr_schedule.kind}"
        given.contradiction("scheduler.type", scheduler["type"], recipe, remedy)
    for key, needed in (("zero_allow_untested_optimizer", True), ("zero_force_ds_cpu_optimizer", False)):
        value = given.values.get(key)
        if value not in (None, AUTO) and value is not needed:
            remedy = "take it out; megalm gives DeepSpeed its own optimizer"
            given.contradiction(key, value, f"optim.kind={config.optim.kind}", remedy)


def _check_zero(given: _Json, config: RunConfig) -> None:
    zero, stage = given.section("zero_optimization"), config.zero.stage
    given_stage = zero.get("stage")
    if given_stage not in (None, AUTO) and not _equal(given_stage, stage):
        remedy = f"set zero.stage={json.dumps(given_stage)}, or choose another zero.config"
        given.contradiction("zero_optimization.stage", given_stage, f"zero.stage={stage}", remedy)
    if zero.get("overlap_comm") is True and stage == 1:
        remedy = "set overlap_comm to false; stage 1 reduces its gradients once, after the last microbatch"
        given.contradiction("zero_optimization.overlap_comm", True, f"zero.stage={stage}", remedy)
    elif zero.get("overlap_comm") is True and config.parallel.pipeline > 1:
        recipe = f"parallel.pipeline={config.parallel.pipeline}"
        remedy = "set overlap_comm to false; a pipeline reduces its gradients after its last microbatch"
        given.contradiction("zero_optimization.overlap_comm", True, recipe, remedy)
    for key in sorted(NOT_GATED & zero.keys()):
        if zero[key] is True or zero[key] not in (None, False, AUTO, 1, {"device": "none"}):
            remedy = "take it out; no layout with it is held to the one-process reference"
            given.contradiction(f"zero_optimization.{key}", zero[key], f"zero.stage={stage}", remedy)
    if zero.get("compute_grad_norm") is False:
        remedy = "take it out; the norm is logged and clipped by"
        given.contradiction("zero_optimization.compute_grad_norm", False, f"zero.stage={stage}", remedy)
    _check_values(given, zero)
    _check_offload(given, zero.get("offload_optimizer"), stage)


def _check_values(given: _Json, zero: dict[str, Any]) -> None:
    """Note flags that are neither true nor false, and sizes that are no whole numbers."""
    for key in sorted(zero.keys() & (FLAGS | COUNTS)):
        value, where = zero[key], f"{given.name}:zero_optimization.{key}"
        if key in FLAGS and not isinstance(value, bool):
            given.problems.append(f"{where}={json.dumps(value)[:60]} is no flag; write true or false")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in COUNTS and not (is_number and value >= 1 and value == int(value)):
            given.problems.append(f"{where}={json.dumps(value)[:60]} is no size; write a whole number from 1 on")


def _check_offload(given: _Json, value: Any, stage: int) -> None:
    key = "zero_optimization.offload_optimizer"
    if value is not None and not isinstance(value, dict):
        given.problems.append(f"{given.name}:{key}={json.dumps(value)[:60]} is not an object; write {{...}}")
        return
    for name in sorted((value or {}).keys() - OFFLOAD_KEYS):
        given.contradiction(
            f"{key}.{name}", (value or {})[name], f"zero.stage={stage}", "take it out; no layout with it is gated"
        )
    device = (value or {}).get("device", "none")
    if device not in ("none", "cpu"):
        remedy = "use cpu; no other device is held to the one-process reference"
        given.contradiction(f"{key}.device", device, f"zero.stage={stage}", remedy)
    elif device != "none" and stage < 1:
        remedy = "offload needs zero.stage 1 or more, here it would have no effect"
        given.contradiction(f"{key}.device", device, f"zero.stage={stage}", remedy)
