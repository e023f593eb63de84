"""The sections `optim` and `lr_schedule` of a recipe: how weights are updated, and at which rate over time."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import BeforeValidator, Field

from megalm.config.fields import AboveZero, Count, Few, Fraction, NotNegative, Section, Text, as_tuple, one_of


class OptimRule(Section):
    """What differs for parameters whose names match a pattern such as `*.qkv.*`; the first rule that matches counts.

    `lr` is a factor of the schedule's rate; `weight_decay` None is what it would be. `muon` false gives a hidden matrix
    to AdamW. `freeze` leaves a parameter as it is, with neither gradient nor optimizer state.
    """

    match: Text
    lr: NotNegative = 1.0
    weight_decay: NotNegative | None = None
    muon: bool = True
    freeze: bool = False


class OptimSection(Section):
    """The optimizer; `betas` are those of the Adams and Lion, `momentum` of sgd and rmsprop, `alpha` is rmsprop's.

    `state_dtype` bf16 keeps the optimizer's state in it between steps, rounded up or down at random (None: as wide as
    the weights that are updated). `centralize` takes from each row of a matrix's gradient its mean. `ema_decay` keeps
    an average of the weights, a = decay a + (1 - decay) w after each update, which is evaluated and saved beside them.

    Of muon, the keys that begin with its name are the arguments of torch.optim.Muon. What is no hidden matrix is
    updated by AdamW, at the rate `adamw_lr` (None: `lr`, which is right where `muon_adjust_lr_fn` makes both move
    weights alike).
    """

    kind: Annotated[str, one_of("optimizer")] = "adamw"
    lr: AboveZero
    weight_decay: NotNegative = 0.1
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(as_tuple)] = (0.9, 0.95)
    eps: AboveZero = 1e-8
    momentum: Fraction = 0.0
    nesterov: bool = False
    alpha: Fraction = 0.99
    muon_momentum: Fraction = 0.95
    muon_nesterov: bool = True
    muon_ns_steps: Annotated[int, Field(ge=1, le=99)] = 5
    muon_adjust_lr_fn: Annotated[str, one_of("adjust_lr_fn")] = "match_rms_adamw"
    adamw_lr: AboveZero | None = None
    state_dtype: Annotated[str, one_of("state_dtype")] | None = None
    centralize: bool = False
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    rules: Annotated[tuple[OptimRule, ...], BeforeValidator(as_tuple)] = ()

    def rule_of(self, name: str) -> OptimRule | None:
        """Return the first rule that matches a parameter's logical name."""
        return next((rule for rule in self.rules if fnmatchcase(name, rule.match)), None)

    def is_muons(self, name: str) -> bool:
        """Return whether Muon, under that kind, updates the hidden matrix of a logical name."""
        rule = self.rule_of(name)
        return self.kind == "muon" and (rule is None or (rule.muon and not rule.freeze))


class LrScheduleSection(Section):
    """The learning rate over time: linear warm-up, then a shape, then a cool-down.

    The shapes: constant; linear, cosine and exponential down to `min_lr_ratio` x lr; cosine in `cycles`, each from the
    peak; step, which multiplies by `factor` at each of the `milestones`, shares of the steps after the warm-up;
    inverse_sqrt. The last `cooldown_steps` go from where the shape is then to 0, by `cooldown_shape`: after constant
    that is warm-up-stable-decay.
    """

    kind: Annotated[str, one_of("lr_schedule")] = "cosine"
    warmup_steps: Count = 0
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)] = 0.1
    cycles: Few = 1
    milestones: Annotated[tuple[Fraction, ...], BeforeValidator(as_tuple)] = (0.8, 0.9)
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.316
    cooldown_steps: Count = 0
    cooldown_shape: Annotated[str, one_of("cooldown_shape")] = "linear"
