"""The reference against itself, against published vectors and against PyTorch's own functions."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.config.run import RunConfig
from tests.parity.reference import (
    Batch,
    Reference,
    dropped,
    initial_parameter,
    learning_rate,
    normal,
    parameter_shapes,
    philox,
    uniform,
)

VOCAB = 23
GPT: dict[str, Any] = {"layers": 2, "hidden": 16, "heads": 4, "sequence": 7}
LLAMA: dict[str, Any] = GPT | {
    "kv_heads": 2,
    "ffn": 24,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "position": "rotary",
    "bias": False,
    "tie_embeddings": False,
}
MODELS = {
    "gpt": GPT,
    "llama": LLAMA,
    "gpt with dropout": GPT | {"dropout": 0.3},
    "llama with bias": LLAMA | {"bias": True},
}


def make_config(model: dict[str, Any], **sections: Any) -> RunConfig:
    train = {"steps": 20, "global_batch": 4, "micro_batch": 2} | sections.pop("train", {})
    optim = {"lr": 1e-2} | sections.pop("optim", {})
    return RunConfig.model_validate({"model": model, "train": train, "optim": optim, **sections})


def make_batch(rows: int = 4, length: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(5)
    stream = torch.randint(VOCAB, (rows, length + 1), generator=generator)
    mask = torch.rand(rows, length, generator=generator) > 0.2
    return stream[:, :-1], stream[:, 1:], mask


def large_weights(config: RunConfig) -> Reference:
    """Return a float64 reference whose weights are large enough for every term to matter."""
    reference = Reference(config, VOCAB, torch.float64)
    generator = torch.Generator().manual_seed(3)
    for parameter in reference.parameters.values():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return reference


# The known-answer tests that the authors publish with Random123, file kat_vectors, philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox(tuple(np.array([word]) for word in counter), key)
    assert tuple(int(word[0]) for word in words) == expected


def test_element_n_is_word_n_mod_4_of_counter_n_div_4() -> None:
    key = int.from_bytes(hashlib.blake2b(b"7/a/3", digest_size=8).digest(), "little")
    counter = tuple(np.array([word]) for word in (2, 0, 0, 0))
    word = philox(counter, (key & 0xFFFFFFFF, key >> 32))[1]
    assert uniform((7, "a", 3), (5, 4))[2, 1] == (int(word[0]) >> 8) / 2**24


def test_random_numbers_have_their_distributions_and_do_not_depend_on_the_shape() -> None:
    z, u = normal((1, "z"), (100_000,)), uniform((1, "u"), (100_000,))
    assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1.0) < 0.01
    assert float(z.pow(4).mean()) == pytest.approx(3.0, abs=0.15)
    assert float(u.min()) >= 0.0 and float(u.max()) < 1.0 and float(u.mean()) == pytest.approx(0.5, abs=0.005)
    assert torch.equal(normal((1, "z"), (3, 5)).flatten(), z[:15])
    assert not torch.equal(normal((2, "z"), (15,)), z[:15])


def test_initial_weights() -> None:
    config = make_config(GPT | {"hidden": 64})
    shapes = parameter_shapes(config, VOCAB)
    values = {name: initial_parameter(config, name, shape) for name, shape in shapes.items()}
    assert torch.all(values["final_norm.weight"] == 1.0) and torch.all(values["blocks.0.mlp.up.bias"] == 0.0)
    assert values["blocks.1.mlp.up.weight"].std() == pytest.approx(0.02, rel=0.03)
    assert values["blocks.1.mlp.down.weight"].std() == pytest.approx(0.01, rel=0.03)  # 2L = 4 branches


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_gradients_are_the_slopes_of_the_loss(model: dict[str, Any]) -> None:
    """Compare with a central difference along a random direction of each parameter.

    At a distance of 1e-5 both the truncation (1e-10 times a third derivative of order 1 to 100) and the
    rounding (1e-16 / 1e-5) stay below 1e-8 of a slope of order 1.
    """
    reference = large_weights(make_config(model, loss={"label_smoothing": 0.1}))
    batch = make_batch()
    _, gradients = reference.gradients(batch, step=3)
    assert gradients.keys() == reference.parameters.keys()
    for name, parameter in reference.parameters.items():
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        direction /= direction.norm()
        parameter.add_(1e-5 * direction)
        above, _ = reference.gradients(batch, step=3)
        parameter.sub_(2e-5 * direction)
        below, _ = reference.gradients(batch, step=3)
        parameter.add_(1e-5 * direction)
        assert float((gradients[name] * direction).sum()) == pytest.approx(
            (above - below) / 2e-5, rel=1e-6, abs=1e-8
        ), name


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_a_token_changes_no_logits_before_it(model: dict[str, Any]) -> None:
    reference = large_weights(make_config(model))
    tokens, _, _ = make_batch()
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB
    before, after = reference.logits(tokens), reference.logits(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert torch.all((before[:, 4:] != after[:, 4:]).any(dim=-1))


def builtin_logits(reference: Reference, tokens: Tensor) -> Tensor:
    """The same model of PyTorch's own functions."""
    model, w = reference.config.model, reference.parameters
    rows, length = tokens.shape
    groups, size = model.key_value_heads, model.head_size

    def norm(x: Tensor, name: str) -> Tensor:
        if model.norm == "rmsnorm":
            return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], model.norm_eps)
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), model.norm_eps)

    def rotate(x: Tensor) -> Tensor:  # [.., T, E] as complex numbers of modulus 1
        if model.position != "rotary":
            return x
        angle = torch.outer(torch.arange(length), model.rotary_base ** (-torch.arange(0, size, 2).double() / size))
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    x = w["embedding.weight"][tokens]
    if model.position == "learned":
        x = x + w["position.weight"]
    for i in range(model.layers):
        b = f"blocks.{i}"
        qkv = F.linear(norm(x, f"{b}.attention_norm"), w[f"{b}.attention.qkv.weight"], w.get(f"{b}.attention.qkv.bias"))
        heads = qkv.view(rows, length, groups, -1, size).split([model.heads // groups, 1, 1], dim=3)
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in heads)
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        mixed = mixed.transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, w[f"{b}.attention.out.weight"], w.get(f"{b}.attention.out.bias"))
        h, up, bias = norm(x, f"{b}.mlp_norm"), w[f"{b}.mlp.up.weight"], w.get(f"{b}.mlp.up.bias")
        if model.activation == "swiglu":
            biases = (None, None) if bias is None else bias
            h = F.silu(F.linear(h, up[0], biases[0])) * F.linear(h, up[1], biases[1])
        else:
            h = F.gelu(F.linear(h, up, bias), approximate="tanh")
        x = x + F.linear(h, w[f"{b}.mlp.down.weight"], w.get(f"{b}.mlp.down.bias"))
    return F.linear(norm(x, "final_norm"), w["embedding.weight" if model.tie_embeddings else "head.weight"])


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_logits_are_those_of_torchs_own_functions(model: dict[str, Any]) -> None:
    reference = large_weights(make_config(model))
    tokens, _, _ = make_batch()
    torch.testing.assert_close(reference.logits(tokens), builtin_logits(reference, tokens), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_mean_over_valid_tokens_whatever_the_label_of_the_others(smoothing: float) -> None:
    reference = large_weights(make_config(GPT, loss={"label_smoothing": smoothing}))
    tokens, labels, mask = make_batch()
    loss, _ = reference.gradients((tokens, labels.masked_fill(~mask, -100), mask), step=0)
    logits = reference.logits(tokens)
    expected = F.cross_entropy(logits[mask], labels[mask], label_smoothing=smoothing)
    assert loss == pytest.approx(expected.item(), rel=1e-13)


def test_dropout_drops_where_the_number_is_below_the_rate_and_keeps_the_mean() -> None:
    x = torch.full((50, 20, 20), 2.0, dtype=torch.float64)
    y = dropped(x, 0.2, (1, "site"), first=10, global_batch=60)
    u = uniform((1, "site"), (60, 20, 20))[10:]
    assert torch.equal(y == 0.0, u < 0.2) and torch.all(y[u >= 0.2] == 2.5)
    assert float(y.mean()) == pytest.approx(2.0, rel=0.02)


def test_dropout_masks_belong_to_the_place_in_the_global_batch() -> None:
    reference = large_weights(make_config(GPT | {"dropout": 0.3}))
    tokens, _, _ = make_batch()
    whole = reference.logits(tokens, step=2, global_batch=4)
    last = reference.logits(tokens[3:], step=2, first=3, global_batch=4)
    torch.testing.assert_close(last, whole[3:], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(whole, reference.logits(tokens, step=1, global_batch=4))
    assert not torch.allclose(whole, reference.logits(tokens))


def test_learning_rate_warms_up_and_falls_to_its_minimum() -> None:
    config = make_config(GPT, optim={"lr": 2.0}, lr_schedule={"warmup_steps": 4, "min_lr_ratio": 0.1})
    assert [learning_rate(config, step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert learning_rate(config, 12) == pytest.approx(0.2 + 1.8 / 2)  # half of the way from 4 to 20
    assert learning_rate(config, 20) == pytest.approx(0.2)
    constant = make_config(GPT, optim={"lr": 2.0}, lr_schedule={"kind": "constant", "warmup_steps": 4})
    assert [learning_rate(constant, step) for step in (3, 4, 19)] == [2.0, 2.0, 2.0]


def test_a_step_of_sgd_is_the_clipped_gradient_and_decay_of_matrices_only() -> None:
    config = make_config(
        GPT,
        optim={"kind": "sgd", "lr": 0.5, "weight_decay": 0.01},
        lr_schedule={"kind": "constant"},
        train={"clip_grad_norm": 0.25},
    )
    reference = large_weights(config)
    before = {name: p.clone() for name, p in reference.parameters.items()}
    _, gradients = reference.gradients(make_batch(), step=0)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    _, reported = reference.train_step(make_batch(), step=0)
    assert reported == pytest.approx(norm, rel=1e-13) and norm > 0.25
    for name, parameter in reference.parameters.items():
        matrix = name.endswith("weight") and "norm" not in name
        decay = 0.01 * before[name] if matrix else 0.0
        expected = before[name] - 0.5 * (gradients[name] * 0.25 / (norm + 1e-6) + decay)
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_training_learns_the_batch_in_every_precision(dtype: torch.dtype) -> None:
    reference = Reference(make_config(GPT, train={"steps": 60}), VOCAB, dtype)
    losses = [reference.train_step(make_batch(), step)[0] for step in range(60)]
    assert losses[0] == pytest.approx(math.log(VOCAB), rel=0.01)
    assert losses[-1] < 0.5 * losses[0]


def test_bf16_keeps_fp32_master_weights_and_gradients() -> None:
    config = make_config(GPT)
    coarse, fine = Reference(config, VOCAB, torch.bfloat16), Reference(config, VOCAB, torch.float32)
    for name, parameter in coarse.parameters.items():
        fine.parameters[name].copy_(parameter)
    assert all(p.dtype is torch.float32 and torch.equal(p, p.bfloat16().float()) for p in coarse.parameters.values())
    _, gradients = coarse.gradients(make_batch(), step=0)
    _, expected = fine.gradients(make_batch(), step=0)
    total = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    for name, gradient in gradients.items():
        assert gradient.dtype is torch.float32
        # bf16 keeps 8 bits: 0.4% an operation, over the few dozen operations of a path. A key's bias has no
        # gradient.
        assert (gradient - expected[name]).norm() <= 0.05 * max(float(expected[name].norm()), 0.01 * total), name
    coarse.train_step(make_batch(), step=0)
    assert any(not torch.equal(p, p.bfloat16().float()) for p in coarse.parameters.values())
