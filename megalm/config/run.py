"""The frozen schema of a run: every key of a recipe, its type, its range and its default.

Owns the sections, but those of `model` and `optim`. It leaves rules between keys to `checks`, reading and joining
files to `load`, and the DeepSpeed JSON to `deepspeed`. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator
from pydantic.fields import FieldInfo

from megalm.config import checks, ramps
from megalm.config import context_checks as context_checks  # its rules add themselves
from megalm.config import expert_checks as expert_checks
from megalm.config import float8_checks as float8_checks
from megalm.config import latent_checks as latent_checks
from megalm.config import loop_checks as loop_checks
from megalm.config import optim_checks as optim_checks
from megalm.config import overlap_checks as overlap_checks
from megalm.config import pattern_checks as pattern_checks
from megalm.config import pipeline_checks as pipeline_checks
from megalm.config.checks import check_world as check_world
from megalm.config.choices import FOLDED_SCHEDULES
from megalm.config.fields import (
    LARGEST_COUNT,
    LARGEST_ENUMERATED,
    AboveZero,
    Count,
    Few,
    Fraction,
    NotNegative,
    Positive,
    Section,
    Seed,
    Text,
    as_tuple,
    one_of,
)
from megalm.config.model import ModelSection
from megalm.config.optim import LrScheduleSection, OptimSection
from megalm.errors import ConfigError


class RunSection(Section):
    """Where the run writes, what it computes on (auto: CUDA where there is a device), how long it waits for ranks.

    A rank that does not go on for `hang_timeout_s` (0: none watches) ends the run, which names it and shows its stacks;
    `collective_timeout_s` bounds the wait for it where nobody watches. One that dies is noticed at once. Each
    `compare_replicas_every` steps and before each checkpoint (0: never) what replicas hold alike is compared bit for
    bit, and each `compare_speed_every` steps (0: never) the times that ranks took for four times as many: who is a
    tenth slower is named. `preflight` looks at versions, disk, clocks and memory of all nodes before the first step.
    """

    dir: Text = "runs/default"
    device: Annotated[str, one_of("device")] = "auto"
    preflight: bool = True
    start_timeout_s: Positive = 60
    collective_timeout_s: Positive = 600
    hang_timeout_s: Count = 480
    compare_replicas_every: Count = 1000
    compare_speed_every: Annotated[int, Field(ge=0, le=1000)] = 5


class ParallelSection(Section):
    """How one copy of the model is split over ranks; data is what remains of the world size.

    `context` ranks divide the tokens of each row. For attention they pass keys and values round (ring), or change to
    all tokens of some heads (ulysses).

    `virtual_stages` is the number of chunks of layers on each stage where the schedule leaves it open. `partition` is
    the number of layers of each stage, or of each chunk in the order of the model. `expert` neighbours among the
    replicas, data x context, divide the experts between them and send each other tokens.
    """

    tensor: Few = 1
    pipeline: Few = 1
    context: Few = 1
    context_attention: Annotated[str, one_of("context_attention")] = "ring"
    expert: Few = 1
    sequence: bool = False
    schedule: Annotated[str, one_of("schedule")] = "1f1b"
    virtual_stages: Few = 1
    partition: Annotated[tuple[Positive, ...], BeforeValidator(as_tuple)] | None = None

    @property
    def ranks(self) -> int:
        """The ranks that work on one row: those of a data index."""
        return self.tensor * self.pipeline * self.context

    @property
    def least_ranks(self) -> int:
        """The ranks of the smallest world: so many replicas as divide the experts, in whole rows."""
        return self.tensor * self.pipeline * math.lcm(self.context, self.expert)

    @property
    def chunks(self) -> int:
        """The chunks of layers on each stage."""
        return 2 if self.schedule in FOLDED_SCHEDULES else self.virtual_stages


class ZeroSection(Section):
    """DeepSpeed ZeRO: the stage, and the JSON (a shipped name or a path; None: `zero{stage}`)."""

    stage: Annotated[int, Field(ge=0, le=3)] = 0
    config: Text | None = None


class OverlapSection(Section):
    """What is sent while something else is computed. It changes the rounding of what is computed, and nothing else.

    With `gradients` those that are final are summed over the replicas while the last backward pass makes the others.
    The tokens of a tensor-parallel layer go through in `tensor_chunks` pieces: while one is multiplied, another is
    summed or gathered over the tensor ranks. With `messages` the receive of a pipeline stage's next action is posted
    before the action at hand; without, when the next action begins.
    """

    gradients: bool = False
    tensor_chunks: Few = 1
    messages: bool = True


class TrainSection(Section):
    """Steps and batches, which count sequences. `stop_at` ends the run early, its schedule unchanged.

    Where ranks and microbatches do not divide a global batch, `pad_batch` fills it up with rows that have no loss, but
    cost their time: a run may go on with any number of data ranks.

    How long the run is, is said by one of `steps`, `tokens`, and `epochs` of the training text; whole steps are made.

    Gradients are cut to `clip_grad_value` each, then scaled to a norm, over the whole model, of `clip_grad_norm` at
    most. Between replicas they travel in `reduce_dtype`: bf16 halves the traffic and rounds each rank's sum; None: as
    they are summed over microbatches, fp32 for weights of 16 bits.

    `recompute` says what the backward pass computes again instead of keeping it: whole blocks (full), or what is large
    and cheap (selective): inputs of linear layers that norms, activation functions and gathers make, and attention's
    scores where they are kept; in each `recompute_every`-th block. With `offload_activations` what is kept of the
    blocks waits in the host's memory for its backward pass. `compile` has torch.compile make one program of each block.

    A new run starts with the weights at `init_from`, a run, one of its checkpoints, or a Hugging Face directory; its
    steps begin anew, and so does its optimizer but for `init_optimizer`, with which state and updates are the source's.

    `fp8` rounds the operands of the products of the blocks' linear layers to 8 bits, by a recipe of torchao's: with one
    scale a matrix (tensorwise), or one a row (rowwise), of which the last leaves weights' gradients in bf16.
    """

    steps: Positive | None = None
    tokens: Positive | None = None
    epochs: AboveZero | None = None
    stop_at: Positive | None = None
    global_batch: Positive
    micro_batch: Positive
    pad_batch: bool = False
    clip_grad_norm: AboveZero | None = 1.0
    clip_grad_value: AboveZero | None = None
    reduce_dtype: Annotated[str, one_of("reduce_dtype")] | None = None
    recompute: Annotated[str, one_of("recompute")] = "none"
    recompute_every: Few = 1
    offload_activations: bool = False
    compile: bool = False
    fp8: Annotated[str, one_of("fp8")] = "none"
    init_from: Text | None = None
    init_optimizer: bool = False


class BatchRampSection(Section):
    """A global batch of `start` sequences at first (None: the whole batch), `increment` more each `every` steps.

    `increment` None is `start`; the batch ends at `train.global_batch`.
    """

    start: Positive | None = None
    increment: Positive | None = None
    every: Positive | None = None


class SequenceWarmupSection(Section):
    """Sequences of `start` tokens at first (None: whole ones), twice as long each `every` steps, to `model.sequence`.

    A sequence is cut into shorter ones, so a step has the same tokens and none is left out.
    """

    start: Positive | None = None
    every: Positive | None = None


class LossSection(Section):
    """The training loss. `fused_head` joins it with the output head: logits are never stored, at one more product.

    `z_loss` times the squared log of the softmax's denominator keeps logits small. `mtp` times the mean over the depths
    of `model.mtp_depth` of their losses is added, each summed over the tokens whose label is within the row and divided
    by as many tokens as the loss of the next token. A mixture of experts has two more terms, logged by themselves and
    no part of `train/loss`: `load_balance` times how unevenly the tokens of a sequence go to the experts (1: evenly),
    and `router_z` times the squared log of the denominator of a router's softmax.
    """

    label_smoothing: Fraction = 0.0
    z_loss: NotNegative = 0.0
    mtp: AboveZero = 0.3
    load_balance: NotNegative = 0.01
    router_z: NotNegative = 0.0
    fused_head: bool = False


class LossScaleSection(Section):
    """The factor of the loss under precision fp16, taken out of the gradients again before anything is done with them.

    It starts at `initial`, is halved after a step whose gradients overflow, which makes no update, and doubled after
    `window` steps in a row without. An overflow at the `minimum` is a step that went wrong.
    """

    initial: AboveZero = 65536.0
    window: Positive = 1000
    minimum: AboveZero = 1.0


class DataSection(Section):
    """A directory made by `megalm data prepare`; `seed` orders the samples (None: the run's seed).

    A row is the next `model.sequence` tokens of the text, all documents one behind the other (stream), or a document
    (documents): a shorter one is padded, and its padding has no loss but counts where tokens are counted; a longer one
    has several rows. Held-out text is cut alike.
    """

    path: Text = "data/builtin"
    rows: Annotated[str, one_of("rows")] = "stream"
    seed: Seed | None = None


class StabilitySection(Section):
    """What happens to a step that goes wrong: its batch makes no update.

    Wrong is a loss or gradient that is not finite, and a loss more than `spike_sigma` standard deviations (0: never)
    above the mean of the last `spike_window` steps. After `patience` such steps within ten the run goes back to the
    last checkpoint from before them and on with the data behind them, `rollbacks` times at most; then it stops.
    """

    spike_sigma: NotNegative = 6.0
    spike_window: Annotated[int, Field(ge=8, le=LARGEST_ENUMERATED)] = 128
    patience: Annotated[int, Field(ge=1, le=10)] = 3
    rollbacks: Count = 3


class EarlyStopSection(Section):
    """Ends a run once a metric (None: never) has not become better, by `min_delta` at least, for `patience` values.

    Better is smaller. The metrics of `evaluate` have a value at each evaluation, the others one a step. The run is
    saved as at its end.
    """

    metric: Annotated[str, one_of("stop_metric")] | None = None
    patience: Positive = 5
    min_delta: NotNegative = 0.0


class CheckpointSection(Section):
    """A checkpoint each `every` steps (0: none) and at the end, of which the last `keep` stay.

    Those of each `keep_every`-th step (None: of none) stay for ever, and the best by the metric `keep_best` (None: of
    none) stays until there is a better one; less is better. `at_end` false, for benchmarks, leaves out the one at the
    end. A run that is asked to stop saves in any case.

    `asynchronous` ones are written while training goes on, from a copy in the host's memory. As many as `failures` in a
    row may fail, on a full disk say, before the run ends; with 0 each is waited for.
    """

    every: Count = 1000
    at_end: bool = True
    keep: Positive = 2
    keep_every: Positive | None = None
    keep_best: Annotated[str, one_of("stop_metric")] | None = None
    asynchronous: bool = True
    failures: Count = 3


class EvaluateSection(Section):
    """Evaluation each `every` steps and at the end (0: only there) on `sequences` held-out sequences (None: all)."""

    every: Count = 1000
    sequences: Positive | None = None


class LogSection(Section):
    """A line of metrics each `every` steps, to `metrics.jsonl` and to the sinks."""

    every: Positive = 1
    sinks: Annotated[tuple[Annotated[str, one_of("sink")], ...], BeforeValidator(as_tuple)] = ()


class ProfileSection(Section):
    """Traces of the steps from `start` on (None: none), `steps` of them, on the `ranks` (None: all) that write one.

    `memory` adds what each operation allocates. At the step `memory_at` they write what their memory holds.
    """

    start: Positive | None = None
    steps: Positive = 3
    ranks: Annotated[tuple[Count, ...], BeforeValidator(as_tuple)] | None = (0,)
    memory: bool = False
    memory_at: Positive | None = None


class InspectSection(Section):
    """Statistics by layer (norms, updates, activations, attention) each `every` steps (0: never)."""

    every: Count = 0


class RunConfig(Section):
    """A whole run. Building one checks the rules between keys too: ConfigError where they are broken."""

    seed: Seed = 1234
    precision: Annotated[str, one_of("precision")] = "fp32"
    run: RunSection = RunSection()
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    zero: ZeroSection = ZeroSection()
    overlap: OverlapSection = OverlapSection()
    train: TrainSection
    batch_ramp: BatchRampSection = BatchRampSection()
    sequence_warmup: SequenceWarmupSection = SequenceWarmupSection()
    optim: OptimSection
    lr_schedule: LrScheduleSection = LrScheduleSection()
    loss: LossSection = LossSection()
    loss_scale: LossScaleSection = LossScaleSection()
    data: DataSection = DataSection()
    stability: StabilitySection = StabilitySection()
    early_stop: EarlyStopSection = EarlyStopSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    log: LogSection = LogSection()
    profile: ProfileSection = ProfileSection()
    inspect: InspectSection = InspectSection()

    @property
    def known_steps(self) -> int | None:
        """The steps of the whole run; None where it is counted in epochs, of which only the data knows the size."""
        train = self.train
        if train.steps is None and train.tokens is not None:
            return ramps.steps_for(self, -(-train.tokens // self.model.sequence))
        return train.steps

    @property
    def steps(self) -> int:
        """The steps of the whole run, whose epochs `with_windows` has made tokens."""
        assert self.known_steps is not None, "epochs are counted in windows of the data"
        return self.known_steps

    def with_windows(self, windows: int) -> RunConfig:
        """Return the same run over a training text of so many windows, its epochs made tokens.

        Raises ConfigError where the length, known now, breaks a rule.
        """
        if self.train.epochs is None:
            return self
        epochs = Decimal(str(self.train.epochs))  # as it is written: 8.3 epochs of 30 windows are 249, not 250
        tokens = math.ceil(epochs * windows) * self.model.sequence
        if tokens > LARGEST_COUNT:
            raise ConfigError(
                f"train.epochs={self.train.epochs:g} are {tokens} tokens, more than a run can have; use at most "
                f"{LARGEST_COUNT / (windows * self.model.sequence):.3g}"
            )
        train = {**self.train.model_dump(), "epochs": None, "tokens": tokens}
        return RunConfig.model_validate({**self.model_dump(), "train": train})

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


def key_fields() -> dict[str, FieldInfo]:
    """Return every key's declaration, its type and default, by its dotted path: `seed`, `model.layers`, ..."""
    sections = section_types()
    fields: dict[str, FieldInfo] = {}
    for name, field in RunConfig.model_fields.items():
        if name in sections:
            fields |= {f"{name}.{key}": inner for key, inner in sections[name].model_fields.items()}
        else:
            fields[name] = field
    return fields
