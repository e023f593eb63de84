"""The frozen schema of a run: every key of a recipe, its type, its range and its default.

Owns the sections and the values derived from them. It leaves rules between keys to `checks`, reading and
joining files to `load`, and the DeepSpeed JSON to `deepspeed`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from megalm.config import checks
from megalm.config.checks import check_world as check_world
from megalm.config.choices import CHOICES
from megalm.errors import ConfigError
from megalm.registry import unknown_name

LARGEST_COUNT = 2**40
LARGEST_ENUMERATED = 2**17  # layers, heads, ranks of an axis: what is gone through one by one
LARGEST_SEED = 2**63 - 1


def _one_of(kind: str) -> AfterValidator:
    """Return a validator that accepts the names of `CHOICES[kind]` and suggests one for any other."""

    def check(value: str) -> str:
        if value not in CHOICES[kind]:
            hint = unknown_name(value, CHOICES[kind])
            raise PydanticCustomError("unknown_choice", "unknown {kind}; {hint}", {"kind": kind, "hint": hint})
        return value

    return AfterValidator(check)


def _as_tuple(value: Any) -> Any:
    """Turn YAML's list into the tuple that a frozen section holds; leave the rest for the type check."""
    return tuple(value) if isinstance(value, list) else value


Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Positive = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Few = Annotated[int, Field(ge=1, le=LARGEST_ENUMERATED)]
Text = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """A frozen part of a recipe: strict types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RunSection(Section):
    """Where the run writes, what it computes on (auto: CUDA where there is a device), how long it waits for ranks.

    A rank that does not go on for `hang_timeout_s` (0: none watches) ends the run, which names it and shows its stacks;
    `collective_timeout_s` bounds the wait for it where nobody watches. One that dies is noticed at once. Each
    `compare_replicas_every` steps (0: never) the weights that data ranks hold alike are compared bit for bit.
    `preflight` looks at versions, disk, clocks and memory of all nodes before the first step.
    """

    dir: Text = "runs/default"
    device: Annotated[str, _one_of("device")] = "auto"
    preflight: bool = True
    start_timeout_s: Positive = 60
    collective_timeout_s: Positive = 600
    hang_timeout_s: Count = 480
    compare_replicas_every: Count = 1000


class ModelSection(Section):
    """The Transformer's shape. None stands for the value that the property of the same meaning derives.

    `kernels` says what computes it: fused Triton kernels or plain torch (auto: fused on CUDA); `flash_attention` false
    stores the whole matrix of attention scores. The model is the same.
    """

    layers: Few
    hidden: Positive
    heads: Few
    kv_heads: Positive | None = None
    ffn: Positive | None = None
    vocab: Positive | None = None
    sequence: Positive
    norm: Annotated[str, _one_of("norm")] = "layernorm"
    norm_eps: AboveZero = 1e-5
    activation: Annotated[str, _one_of("activation")] = "gelu"
    position: Annotated[str, _one_of("position")] = "learned"
    rotary_base: AboveZero = 10000.0
    dropout: Fraction = 0.0
    bias: bool = True
    tie_embeddings: bool = True
    init_std: AboveZero = 0.02
    kernels: Annotated[str, _one_of("kernels")] = "auto"
    flash_attention: bool = True

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.hidden // self.heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values; fewer than `heads` under grouped-query attention."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def feed_forward(self) -> int:
        """Features inside the MLP: `ffn`, else 4 x hidden; for swiglu 8/3 x hidden up to a multiple of 64."""
        if self.ffn is not None:
            return self.ffn
        if self.activation == "swiglu":
            return -(-8 * self.hidden // (3 * 64)) * 64
        return 4 * self.hidden


class ParallelSection(Section):
    """How one copy of the model is split over ranks; data is what remains of the world size."""

    tensor: Few = 1
    pipeline: Few = 1
    sequence: bool = False
    schedule: Annotated[str, _one_of("schedule")] = "1f1b"
    partition: Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple)] | None = None


class ZeroSection(Section):
    """DeepSpeed ZeRO: the stage, and the JSON (a shipped name or a path; None: `zero{stage}`)."""

    stage: Annotated[int, Field(ge=0, le=3)] = 0
    config: Text | None = None


class TrainSection(Section):
    """Steps and batches, which count sequences. `stop_at` ends the run early, its schedule unchanged."""

    steps: Positive
    stop_at: Positive | None = None
    global_batch: Positive
    micro_batch: Positive
    clip_grad_norm: AboveZero | None = 1.0
    recompute: Annotated[str, _one_of("recompute")] = "none"


class OptimSection(Section):
    """The optimizer; `betas` and `eps` are adamw's, `momentum` is sgd's."""

    kind: Annotated[str, _one_of("optimizer")] = "adamw"
    lr: AboveZero
    weight_decay: NotNegative = 0.1
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_as_tuple)] = (0.9, 0.95)
    eps: AboveZero = 1e-8
    momentum: Fraction = 0.0


class LrScheduleSection(Section):
    """The learning rate over time: linear warm-up, then constant or a cosine down to `min_lr_ratio` x lr."""

    kind: Annotated[str, _one_of("lr_schedule")] = "cosine"
    warmup_steps: Count = 0
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)] = 0.1


class LossSection(Section):
    """The training loss. `fused_head` joins it with the output head: logits are never stored, at one more product."""

    label_smoothing: Fraction = 0.0
    fused_head: bool = False


class DataSection(Section):
    """A directory made by `megalm data prepare`; `seed` orders the samples (None: the run's seed)."""

    path: Text = "data/builtin"
    seed: Seed | None = None


class CheckpointSection(Section):
    """A checkpoint each `every` steps and at the end (0: only there), of which the last `keep` stay."""

    every: Count = 1000
    keep: Positive = 2


class EvaluateSection(Section):
    """Evaluation each `every` steps and at the end (0: only there) on `sequences` held-out sequences (None: all)."""

    every: Count = 1000
    sequences: Positive | None = None


class LogSection(Section):
    """A line of metrics each `every` steps."""

    every: Positive = 1


class RunConfig(Section):
    """A whole run. Building one checks the rules between keys too: ConfigError where they are broken."""

    seed: Seed = 1234
    precision: Annotated[str, _one_of("precision")] = "fp32"
    run: RunSection = RunSection()
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    zero: ZeroSection = ZeroSection()
    train: TrainSection
    optim: OptimSection
    lr_schedule: LrScheduleSection = LrScheduleSection()
    loss: LossSection = LossSection()
    data: DataSection = DataSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _check_rules(self) -> RunConfig:
        problems = checks.broken_rules(self)
        if problems:
            raise ConfigError(checks.report(problems))
        return self


def section_types() -> Mapping[str, type[Section]]:
    """Return the class of each section by its name in the recipe."""
    return {
        name: field.annotation
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def key_types() -> dict[str, Any]:
    """Return the declared type of every key by its dotted path: `seed`, `model.layers`, ..."""
    sections = section_types()
    types: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if name in sections:
            types |= {f"{name}.{key}": inner.annotation for key, inner in sections[name].model_fields.items()}
        else:
            types[name] = field.annotation
    return types
