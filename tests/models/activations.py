"""How many bytes of activations a rank holds, by formula, as docs/activations.md derives it tensor by tensor.

Of dense blocks with norms before their halves, GELU or SwiGLU, learned or rotary positions over a whole head, and heads
that the tensor ranks divide.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.run import RunConfig
from megalm.config.storage import BYTES
from megalm.pipeline_parallel.actions import Schedule
from megalm.pipeline_parallel.schedules import SCHEDULES
from megalm.pipeline_parallel.simulator import simulate

Bytes = dict[str, int]


@dataclass(frozen=True)
class Sizes:
    """The numbers of one rank's block: `n` tokens of a microbatch, of whose residual stream it has `s`."""

    n: int
    s: int
    rows: int
    D: int
    F: int
    projections: int
    """Of the MLP's input: 2 with a gate."""
    queries: int
    """Features of all its heads."""
    keys: int
    """Features of all its key heads, as many as of its values."""
    heads: int
    T: int
    e: int
    """Bytes of a number."""
    w: int
    """Bytes of a statistic: fp32 or wider."""

    @classmethod
    def of(cls, config: RunConfig) -> Sizes:
        """Return those of a recipe."""
        model, t = config.model, config.parallel.tensor
        rows, T = config.train.micro_batch, model.sequence
        n, e = rows * T, BYTES[config.precision]
        heads, groups = model.heads // t, model.key_value_heads // t
        return cls(
            n, n // t if config.parallel.sequence else n, rows, model.hidden, model.feed_forward // t,
            2 if model.activation == "swiglu" else 1, heads * model.head_size, groups * model.head_size, heads, T,
            e, max(e, 4),
        )  # fmt: skip


def kept(config: RunConfig, recompute: str, kernels: bool = True) -> Bytes:
    """Return what autograd keeps of a block from its forward to its backward pass.

    `kernels`: computed by the kernels, else by plain torch on a CPU.
    """
    z = Sizes.of(config)
    if recompute == "full":
        return {"input": z.s * z.D * z.e}
    rms, gated = config.model.norm == "rmsnorm", z.projections == 2
    statistics = z.s * z.w * (1 if rms else 2)
    normalized = (
        0 if kernels or not rms else z.s * z.D * z.w
    )  # plain torch multiplies by the weight in a step of its own
    found = {
        "input": z.s * z.D * z.e,
        "first norm": statistics + normalized,
        **_attention(config, z, recompute, kernels),
        "input of out": z.n * z.queries * z.e,
        "sum": z.s * z.D * z.e,
        "second norm": statistics + normalized,
        "input of the activation": z.n * z.projections * z.F * z.e,
    }
    if recompute != "selective":
        found |= {f"input of {name}": z.n * width * z.e for name, width in cheap(z).items()}
    if gated and not kernels:
        found["silu of the gate"] = z.n * z.F * z.e
    return found


def cheap(z: Sizes) -> dict[str, int]:
    """Return the features of the inputs that are made again of what is kept beside them."""
    return {"qkv": z.D, "up": z.D, "down": z.F}


def _attention(config: RunConfig, z: Sizes, recompute: str, kernels: bool) -> Bytes:
    if recompute == "selective" and not (kernels and config.model.flash_attention):
        return {"queries, keys, values": z.n * (z.queries + 2 * z.keys) * z.e}
    if config.model.flash_attention:
        statistics = z.n * z.heads * z.w  # of the softmax
        return {"queries, keys, values": z.n * (z.queries + 2 * z.keys) * z.e, "log-sum-exp": statistics}
    # Dropped ones too, whose mask is drawn again; plain torch has them once more with zeros where keys are hidden.
    times = 2 if config.model.probability_dropout or not kernels else 1
    found = {
        "queries, keys, values": 3 * z.n * z.queries * z.e,  # of all heads, laid out for the product
        "probabilities": times * z.n * z.heads * z.T * z.e,
    }
    return found if kernels else {**found, "mask": z.T * z.T}


def owed(config: RunConfig) -> int:
    """Return what a block keeps between the halves of a split backward: its linear layers' inputs and gradients."""
    z = Sizes.of(config)
    inputs = 2 * z.D + z.queries + z.F
    gradients = 2 * z.D + z.queries + 2 * z.keys + z.projections * z.F
    return z.n * (inputs + gradients) * z.e


def working(config: RunConfig) -> int:
    """Return what the backward pass of a block takes for itself at most, in that of its MLP."""
    z = Sizes.of(config)
    again = config.train.recompute == "selective"
    gathered = z.n * z.D if config.parallel.sequence else 0
    below_down = gathered + z.n * z.F + z.F * z.D + again * z.n * z.F  # with the gradient of the weight
    below_activation = z.n * z.projections * z.F  # in place of the input of down, with the gradient of that
    below_activation += again * z.n * z.F  # which was not kept
    below_up = again * (2 * z.n * z.D + z.projections * z.F * z.D)  # its input, that of the weight and of the input
    return (z.s * z.D + max(below_down, below_activation, below_up)) * z.e


def peak(config: RunConfig, stage: int, kernels: bool = True) -> float:
    """Return the most bytes that a stage's rank holds at once in forwards and backwards, without embedding and head."""
    z, parallel = Sizes.of(config), config.parallel
    kind = SCHEDULES.get(parallel.schedule)
    layers = config.model.layers // parallel.pipeline
    whole, less = (sum(kept(config, how, kernels).values()) for how in ("none", config.train.recompute))
    every = config.train.recompute_every
    again = len(range(0, layers, every))
    unit = (layers - again) * whole + again * less
    later = layers * owed(config) / unit if kind.splits_backward else 0.0
    live = simulate(_schedule(config), kept=later).peak_live[stage]
    # What was sent to each neighbour, until it says that it has it, and a message that is waited for.
    neighbours = (stage > 0) + (stage < parallel.pipeline - 1)
    messages = (neighbours * parallel.pipeline + 1) * z.s * z.D * z.e if neighbours else 0
    # The block of which all is there again: the last one, and where a pass is split as much is owed by then.
    last = layers * (stage + 1) - 1
    recomputed = 0 if kind.splits_backward or last % every or config.train.recompute != "full" else whole - less
    return live * unit + messages + recomputed + working(config)


def _schedule(config: RunConfig) -> Schedule:
    kind = SCHEDULES.get(config.parallel.schedule)
    count = config.train.global_batch // config.train.micro_batch
    return kind(config.parallel.pipeline, count, kind.fixed_chunks or config.parallel.virtual_stages)
