"""Joins a DeepSpeed JSON with the recipe into the dict that DeepSpeed is started with.

The JSON owns ZeRO, offload and communication; the recipe owns batch sizes, clipping, precision, optimizer and
schedule. A JSON that says something else than the recipe is refused with both places named; the same value or
DeepSpeed's "auto" is accepted. Imports neither torch nor deepspeed, so a login node can check it.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from megalm.config.checks import divisors, list_values, report
from megalm.config.deepspeed_files import find_config, read_config
from megalm.config.deepspeed_keys import (
    CALL_LOG,
    CHECKED,
    COUNTS,
    FLAGS,
    IDLE,
    LOG_LEVELS,
    LOW_MEMORY_BF16,
    NEEDED_BY_EXPERTS,
    NOT_GATED,
    NVME,
    OFFLOAD_KEYS,
    PASSED_ON,
    REFUSED,
    REFUSED_OFFLOAD,
    ZERO_KEYS,
)
from megalm.config.run import RunConfig
from megalm.errors import ConfigError
from megalm.registry import nearest

NEVER = 10**9
AUTO = "auto"


class _Json(NamedTuple):
    """A DeepSpeed JSON, the file name that errors give, and the contradictions found in it so far."""

    name: str
    values: dict[str, Any]
    problems: list[str]

    def contradiction(self, key: str, value: Any, recipe: str, remedy: str) -> None:
        self.problems.append(f"{self.name}:{key}={json.dumps(value)[:60]} contradicts the recipe's {recipe}; {remedy}")

    def refuse(self, key: str, value: Any, reason: str, remedy: str = "take it out") -> None:
        self.problems.append(f"{self.name}:{key}={json.dumps(value)[:60]}: {reason}; {remedy}")

    def wrong(self, key: str, value: Any, mistake: str) -> None:
        self.problems.append(f"{self.name}:{key}={json.dumps(value)[:60]} {mistake}")

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


def deepspeed_config(config: RunConfig, data_size: int | None = None) -> dict[str, Any]:
    """Return the dict for `deepspeed.initialize`: the JSON that `zero.config` names, joined with the recipe.

    The engine is given a batch of one and no accumulation, because the schedule runs the microbatches and
    scales the loss itself. With `data_size` (ranks on the data axis) an accumulation in the JSON is compared
    exactly. Raises one ConfigError with every contradiction.
    """
    path = find_config(config.zero.config or f"zero{config.zero.stage}")
    given = _Json(path.name, read_config(path), [])
    _check_keys(given)
    _check_batches(given, config, data_size)
    _check_precision(given, config)
    _check_low_memory(given, config)
    _check_optimizer(given, config)
    _check_zero(given, config, data_size)
    _check_watching(given, config)
    if given.problems:
        raise ConfigError(report(given.problems, given.name))
    joined: dict[str, Any] = {"steps_per_print": NEVER, "wall_clock_breakdown": False}
    joined |= {key: value for key, value in given.values.items() if key in PASSED_ON and not _is_off(value)}
    joined |= {
        "zero_optimization": {
            **given.section("zero_optimization"),
            "stage": config.zero.stage,
            "overlap_comm": config.overlap.gradients,
        },
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.clip_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.train.reduce_dtype is not None:
        joined["communication_data_type"] = config.train.reduce_dtype
    if config.precision == "bf16":
        joined |= {"bf16": {"enabled": True, **_low_memory(given)}, "data_types": {"grad_accum_dtype": "fp32"}}
    if config.precision == "fp16":  # the scale is the trainer's; "enabled" would only refuse processors without fp16
        joined |= {"fp16": {"enabled": False, "loss_scale": 1.0}, "data_types": {"grad_accum_dtype": "fp32"}}
    return joined


def _check_keys(given: _Json) -> None:
    """Note keys that DeepSpeed would silently pass over, or that drive parts which megalm does not use."""
    for key in given.values.keys() - PASSED_ON - CHECKED - IDLE.keys():
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
        microbatches = -(-train.global_batch // train.micro_batch)
        whole = isinstance(steps, int) and not isinstance(steps, bool) and steps > 0
        fits = whole and (microbatches % steps == 0 if data_size is None else steps == -(-microbatches // data_size))
        if not fits and not (whole and data_size is None and train.pad_batch):
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
        for extra in section.keys() - {"enabled"} - (LOW_MEMORY_BF16 if key == "bf16" else set()):
            if wanted:
                remedy = "take it out; precision in the recipe decides the whole of it"
                given.contradiction(f"{key}.{extra}", section[extra], recipe, remedy)
    accumulate = "fp64" if config.precision == "fp64" else "fp32"
    travels = config.train.reduce_dtype or accumulate
    given.compare("communication_data_type", given.values.get("communication_data_type"), "train.reduce_dtype", travels)
    for key, value in given.section("data_types").items():
        if value not in (AUTO, None) and (key, value) != ("grad_accum_dtype", accumulate):
            remedy = f"take it out; gradients accumulate in {accumulate}"
            given.contradiction(f"data_types.{key}", value, recipe, remedy)


def _low_memory(given: _Json) -> dict[str, bool]:
    """Return those flags that are set of the two that keep master weights and the optimizer's state in bf16."""
    section = given.section("bf16")
    return {key: section[key] for key in sorted(LOW_MEMORY_BF16 & section.keys()) if section[key] not in (False, AUTO)}


def _check_low_memory(given: _Json, config: RunConfig) -> None:
    """Note states in bf16 where they have no effect, or where DeepSpeed keeps them by its own Adam alone."""
    chosen = _low_memory(given)
    if config.optim.state_dtype is not None and "bf16_optimizer_states" in chosen:
        recipe = f"optim.state_dtype={config.optim.state_dtype}"
        given.contradiction("bf16.bf16_optimizer_states", True, recipe, "take one of the two; the JSON rounds nearest")
    for key, value in chosen.items():
        where, stage = f"bf16.{key}", config.zero.stage
        if value is not True:
            given.problems.append(f"{given.name}:{where}={json.dumps(value)[:60]} is no flag; write true or false")
        elif config.precision != "bf16":
            given.contradiction(where, value, f"precision={config.precision}", "set precision=bf16")
        elif stage < 1:
            given.contradiction(where, value, f"zero.stage={stage}", "set zero.stage to 1, 2 or 3")
        elif len(chosen) < len(LOW_MEMORY_BF16):
            (other,) = LOW_MEMORY_BF16 - chosen.keys()
            given.problems.append(f"{given.name}:{where}=true needs bf16.{other}=true beside it; set both or neither")
        elif given.section("zero_optimization").get("offload_optimizer") not in (None, {"device": "none"}):
            given.refuse(where, value, "DeepSpeed's own Adam alone keeps bf16 states in the host's memory")
        elif config.optim.kind == "apex_adamw":
            given.refuse(where, value, "optim.kind=apex_adamw has a kernel that reads fp32")
        elif config.optim.ema_decay is not None:
            given.refuse(where, value, "optim.ema_decay moves an average by less than bf16 can hold")


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


def _check_zero(given: _Json, config: RunConfig, data_size: int | None) -> None:
    zero, stage = given.section("zero_optimization"), config.zero.stage
    given_stage = zero.get("stage")
    if given_stage not in (None, AUTO) and not _equal(given_stage, stage):
        remedy = f"set zero.stage={json.dumps(given_stage)}, or choose another zero.config"
        given.contradiction("zero_optimization.stage", given_stage, f"zero.stage={stage}", remedy)
    overlap = config.overlap.gradients
    given.compare("zero_optimization.overlap_comm", zero.get("overlap_comm"), "overlap.gradients", overlap)
    for key in sorted(REFUSED.keys() & zero.keys()):
        if zero[key] not in (None, False, AUTO, {"device": "none"}):
            is_nvme = key == "offload_param" and _device(zero[key]) == "nvme"
            given.refuse(f"zero_optimization.{key}", zero[key], NVME if is_nvme else REFUSED[key])
    if zero.get("compute_grad_norm") is False:
        remedy = "take it out; the norm is logged and clipped by"
        given.contradiction("zero_optimization.compute_grad_norm", False, f"zero.stage={stage}", remedy)
    if config.parallel.expert > 1 and stage in (1, 2):
        for key in sorted(key for key in NEEDED_BY_EXPERTS if zero.get(key) is False):
            recipe = f"parallel.expert={config.parallel.expert}"
            given.contradiction(f"zero_optimization.{key}", False, recipe, NEEDED_BY_EXPERTS[key])
    _check_values(given, zero)
    _check_plus_plus(given, zero, config, data_size)
    _check_offload(given, zero.get("offload_optimizer"), config)


def _is_off(value: Any) -> bool:
    """Return whether a key's value turns nothing on; of an object, whether its "enabled" does not."""
    if isinstance(value, dict):
        value = value.get("enabled")
    return value is None or value is False or value == AUTO


def _check_watching(given: _Json, config: RunConfig) -> None:
    """Note what DeepSpeed would print or measure if it ran the steps, and nonsense in what it can."""
    values = given.values
    for key in sorted(IDLE.keys() & values.keys()):
        if not _is_off(values[key]):
            given.refuse(key, values[key], *IDLE[key])
    given.compare("steps_per_print", values.get("steps_per_print"), "log.every", config.log.every)
    level, collect = values.get("log_level"), values.get("disable_python_gc")
    if level not in (None, AUTO) and not (isinstance(level, str) and level.lower() in LOG_LEVELS):
        given.wrong("log_level", level, f"is no level; use {', '.join(LOG_LEVELS)}")
    if not isinstance(collect, bool) and collect not in (None, AUTO):
        given.wrong("disable_python_gc", collect, "is no flag; write true or false")
    for key in ("comms_logger", "disable_python_gc", "log_level"):
        if config.zero.stage < 1 and not _is_off(values.get(key)):
            remedy = "set zero.stage to 1, 2 or 3; stage 0 does without DeepSpeed, here it would have no effect"
            given.contradiction(key, values[key], f"zero.stage={config.zero.stage}", remedy)
    _check_call_log(given, given.section("comms_logger"))


def _check_call_log(given: _Json, log: dict[str, Any]) -> None:
    """Note keys of `comms_logger` that megalm's table has no use for, and one that DeepSpeed passes over."""
    if log and "enabled" not in log:  # DeepSpeed logs wherever there is an object, "enabled" or not
        given.wrong("comms_logger", log, 'does not say whether; write "enabled": true')
    for key, value in log.items():
        where = f"comms_logger.{key}"
        if key in CALL_LOG and not _equal(value, CALL_LOG[key][0]):
            given.refuse(where, value, CALL_LOG[key][1])
        elif key in ("enabled", "debug") and not isinstance(value, bool):
            given.wrong(where, value, "is no flag; write true or false")
        elif key not in ("enabled", "debug", *CALL_LOG):
            given.wrong(where, value, "is an unknown key; DeepSpeed 0.19.8 has none such, take it out")


def _check_values(given: _Json, zero: dict[str, Any]) -> None:
    """Note flags that are neither true nor false, and sizes that are no whole numbers."""
    for key in sorted(zero.keys() & (FLAGS | COUNTS)):
        value, where = zero[key], f"{given.name}:zero_optimization.{key}"
        if key in FLAGS and not isinstance(value, bool):
            given.problems.append(f"{where}={json.dumps(value)[:60]} is no flag; write true or false")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in COUNTS and not (is_number and value >= 1 and value == int(value)):
            given.problems.append(f"{where}={json.dumps(value)[:60]} is no size; write a whole number from 1 on")


def _check_plus_plus(given: _Json, zero: dict[str, Any], config: RunConfig, data_size: int | None) -> None:
    """Note parts of ZeRO++ where they have no effect or cannot work."""
    size, quantized = zero.get("zero_hpz_partition_size", 1), zero.get("zero_quantized_weights", False)
    for key, value, off in (("zero_hpz_partition_size", size, 1), ("zero_quantized_weights", quantized, False)):
        if value != off and config.zero.stage < 3:
            remedy = "set zero.stage=3; other stages have whole weights, here it would have no effect"
            given.contradiction(f"zero_optimization.{key}", value, f"zero.stage={config.zero.stage}", remedy)
    replicas = None if data_size is None else data_size * config.parallel.context
    if replicas is not None and isinstance(size, int | float) and size >= 1 and replicas % size:
        given.problems.append(
            f"{given.name}:zero_optimization.zero_hpz_partition_size={size} does not divide the {replicas} ranks that "
            f"hold the same layers; use {list_values(divisors(replicas))}"
        )
    if quantized is True and config.run.device == "cpu":
        remedy = "take it out; its kernel runs on CUDA"
        given.contradiction("zero_optimization.zero_quantized_weights", True, "run.device=cpu", remedy)


def _device(offload: Any) -> Any:
    """Return where an offload section puts things."""
    return offload.get("device", "none") if isinstance(offload, dict) else "none"


def _check_offload(given: _Json, value: Any, config: RunConfig) -> None:
    key, stage = "zero_optimization.offload_optimizer", config.zero.stage
    if value is not None and not isinstance(value, dict):
        given.problems.append(f"{given.name}:{key}={json.dumps(value)[:60]} is not an object; write {{...}}")
        return
    device = _device(value)
    if device not in ("none", "cpu"):
        given.refuse(f"{key}.device", device, NVME if device == "nvme" else NOT_GATED, "use cpu")
        return
    for name in sorted((value or {}).keys() - OFFLOAD_KEYS):
        given.refuse(f"{key}.{name}", (value or {})[name], REFUSED_OFFLOAD.get(name, NOT_GATED))
    if device != "none" and stage < 1:
        remedy = "offload needs zero.stage 1 or more, here it would have no effect"
        given.contradiction(f"{key}.device", device, f"zero.stage={stage}", remedy)
    elif device != "none" and config.optim.kind == "apex_adamw":
        given.contradiction(
            f"{key}.device", device, "optim.kind=apex_adamw", "apex's kernel runs on the GPU; use adamw"
        )
