"""A model in the shape of Megatron-DeepSpeed's, trained by DeepSpeed itself and converted by its own ds_to_universal.

Its loss has no matrix products: it pulls each weight to a number, so that what Adam does to a whole tensor is what it
does to the parts of it, and the truth of masters and moments is a few lines of plain torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalm.distributed.mesh import ParallelMesh
from tests.models.foreign.gpt import LEGACY, Shape, Weights, arguments, random_weights, renamed, tensor_rank

STEPS, LR, TARGET, VOCAB, TENSOR = 3, 1e-2, 0.1, 21, 2
SHAPE = Shape(layers=2, groups=2, rms=True, swiglu=True, rope=True, bias=False, qkv_bias=False, tied=False)
PATTERNS = {
    "universal_checkpoint_version": 0.2,
    "original_vocab_size": VOCAB,
    "padded_vocab_size": SHAPE.rows,
    "vocabulary_parameter_patterns": [
        "language_model.embedding.word_embeddings.weight",
        "language_model.output_layer.weight",
    ],
    "tp_replicated_parameter_patterns": [
        r"language_model.encoder.layers.\d+.input_layernorm.weight",
        r"language_model.encoder.layers.\d+.post_attention_layernorm.weight",
        "language_model.encoder.final_layernorm.weight",
    ],
    "parameter_with_row_parallelism_patterns": [
        r"language_model.encoder.layers.\d+.mlp.dense_4h_to_h.weight",
        r"language_model.encoder.layers.\d+.self_attention.dense.weight",
    ],
    "parameter_with_2_sub_params_cat_dim_0": [r"language_model.encoder.layers.\d+.mlp.dense_h_to_4h.weight"],
}
"""What Megatron-DeepSpeed says of such a model's parameters, for whoever joins them."""


def gradient(weight: Tensor) -> Tensor:
    """Return that of the loss, 1.5 (weight - target)^2."""
    return 3.0 * (weight - TARGET)


def trained(weights: Weights, steps: int = STEPS) -> tuple[Weights, Weights, Weights]:
    """Return whole weights after some updates of plain AdamW, and its two moments."""
    parameters = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR)
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = gradient(parameter.detach())
        optimizer.step()
    states = [{name: optimizer.state[p][kind] for name, p in parameters.items()} for kind in ("exp_avg", "exp_avg_sq")]
    return {name: parameter.detach() for name, parameter in parameters.items()}, states[0], states[1]


def megatron_deepspeed_arguments(shape: Shape, tensor: int) -> argparse.Namespace:
    """Return the arguments as Megatron-DeepSpeed has them, which differ from Megatron-LM's in some names."""
    given = arguments(shape, tensor, 1)
    for name in ("norm_epsilon", "rotary_base", "num_query_groups", "group_query_attention", "position_embedding_type"):
        delattr(given, name)
    given.num_key_value_heads, given.layernorm_epsilon, given.rope_theta = shape.groups, 1e-5, 10000
    given.use_rotary_position_embeddings, given.num_experts = shape.rope, [1]
    given.add_position_embedding = not shape.rope
    given.normalization = "rmsnorm" if shape.rms else "layernorm"
    return given


class Unit:
    """The process groups of one tensor rank of several, as DeepSpeed asks for them; each is of this process alone.

    Nothing is summed over tensor ranks in what is trained here, so they may come one after the other.
    """

    def __init__(self, mesh: ParallelMesh, rank: int) -> None:
        for name, index, size in (("data", 0, 1), ("model", rank, TENSOR), ("tensor_model", rank, TENSOR)):
            setattr(self, f"get_{name}_parallel_group", lambda: mesh.group("data"))
            setattr(self, f"get_{name}_parallel_world_size", lambda size=size: size)
            setattr(self, f"get_{name}_parallel_rank", lambda index=index: index)


def train_and_convert(mesh: ParallelMesh, directory: str) -> None:
    """Train a few steps of each tensor rank under ZeRO 1, save, and convert."""
    from megalm.zero import deepspeed_engine as ours  # which keeps DeepSpeed from compiling, and forgets its world

    ours._join(mesh)
    from deepspeed.checkpoint.ds_to_universal import main

    saved = Path(directory) / f"global_step{STEPS}"
    for rank in range(TENSOR):
        _train(mesh, rank, saved)
    convert = argparse.Namespace(input_folder=str(saved), output_folder=f"{saved}_universal", strict=True)
    vars(convert).update(num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False)
    main(argparse.Namespace(**vars(convert), inject_missing_state=False))


def _train(mesh: ParallelMesh, rank: int, saved: Path) -> None:
    import deepspeed

    from megalm.zero import deepspeed_engine as ours

    model = nn.Module()
    tensors = renamed(tensor_rank(SHAPE, random_weights(SHAPE, torch.float32), rank, TENSOR), LEGACY)
    for name, tensor in tensors.items():
        add(model, f"language_model.{name}", tensor)
    model.forward = lambda: sum((1.5 * (p - TARGET) ** 2).sum() for p in model.parameters())  # type: ignore
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, mpu=Unit(mesh, rank), config=config)
    ours._ENGINES.add(engine)
    for _ in range(STEPS):
        engine.backward(engine())
        engine.step()
    client: dict[str, Any] = {"args": megatron_deepspeed_arguments(SHAPE, TENSOR), "iteration": STEPS}
    engine.save_checkpoint(str(saved.parent), saved.name, {**client, "universal_checkpoint_info": PATTERNS})


def add(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a module a parameter under a name with dots, through modules that are made for it."""
    *path, last = name.split(".")
    for word in path:
        if word not in module._modules:
            module.add_module(word, nn.Module())
        inner = module._modules[word]
        assert inner is not None
        module = inner
    module.register_parameter(last, nn.Parameter(tensor.clone()))
