"""Models of published shapes give the logits of another implementation of them, from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.models.build import build_stage
from tests.shards import part_of, spec_of
from tests.worker_pool import WorkerPool

transformers = pytest.importorskip("transformers")

VOCAB, TOKENS = 67, 40
Weights = dict[str, Tensor]


def recipe(**model: Any) -> RunConfig:
    train = {"steps": 1, "global_batch": 1, "micro_batch": 1}
    return RunConfig.model_validate({"model": model, "train": train, "optim": {"lr": 1.0}, "precision": "fp64"})


def grouped(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Return projections [heads * size, ...] as one, by key/value head: its queries, its key, its value."""
    groups = k.shape[0] // size
    parts = (x.view(groups, -1, size, *x.shape[1:]) for x in (q, k, v))
    return torch.cat(tuple(parts), dim=1).flatten(0, 2)


def gpt2(w: Weights) -> Weights:
    size, names = 16, {"embedding": "wte", "position": "wpe", "final_norm": "ln_f"}
    ours = {f"{name}.weight": w[f"transformer.{theirs}.weight"] for name, theirs in names.items()}
    ours["final_norm.bias"] = w["transformer.ln_f.bias"]
    for i in range(2):
        own, their = f"blocks.{i}", f"transformer.h.{i}"
        layers = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
        linear = {"attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
        for kind in ("weight", "bias"):
            ours |= {f"{own}.{name}.{kind}": w[f"{their}.{theirs}.{kind}"] for name, theirs in layers.items()}
            ours |= {f"{own}.{name}.{kind}": w[f"{their}.{theirs}.{kind}"].t() for name, theirs in linear.items()}
            ours[f"{own}.attention.qkv.{kind}"] = grouped(*w[f"{their}.attn.c_attn.{kind}"].t().chunk(3), size)
    return ours


def llama(w: Weights) -> Weights:
    ours = {"embedding.weight": w["model.embed_tokens.weight"], "final_norm.weight": w["model.norm.weight"]}
    ours["head.weight"] = w["lm_head.weight"]
    for i in range(2):
        own, their = f"blocks.{i}", f"model.layers.{i}"
        q, k, v = (w[f"{their}.self_attn.{name}_proj.weight"] for name in "qkv")
        gate_and_up = torch.stack([w[f"{their}.mlp.{name}_proj.weight"] for name in ("gate", "up")])
        ours |= {
            f"{own}.attention_norm.weight": w[f"{their}.input_layernorm.weight"],
            f"{own}.mlp_norm.weight": w[f"{their}.post_attention_layernorm.weight"],
            f"{own}.attention.qkv.weight": grouped(q, k, v, 16),
            f"{own}.attention.out.weight": w[f"{their}.self_attn.o_proj.weight"],
            f"{own}.mlp.up.weight": gate_and_up,
            f"{own}.mlp.down.weight": w[f"{their}.mlp.down_proj.weight"],
        }
    return ours


def bloom(w: Weights) -> Weights:
    ours = {"embedding.weight": w["transformer.word_embeddings.weight"]}
    for kind in ("weight", "bias"):
        ours[f"embedding_norm.{kind}"] = w[f"transformer.word_embeddings_layernorm.{kind}"]
        ours[f"final_norm.{kind}"] = w[f"transformer.ln_f.{kind}"]
        for i in range(2):
            names = {
                "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
                "attention.qkv": "self_attention.query_key_value", "attention.out": "self_attention.dense",
                "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
            }  # fmt: skip
            for name, theirs in names.items():
                ours[f"blocks.{i}.{name}.{kind}"] = w[f"transformer.h.{i}.{theirs}.{kind}"]
    return ours


def deepseek(w: Weights, layers: int = 2) -> Weights:
    """Their pairs of features that turn are neighbours and stand behind those that do not."""
    fixed, turning, heads = 16, 8, 6

    def halves(rows: Tensor) -> Tensor:
        return torch.cat((rows[..., 0::2, :], rows[..., 1::2, :]), dim=-2)

    ours = {"embedding.weight": w["model.embed_tokens.weight"], "final_norm.weight": w["model.norm.weight"]}
    ours["head.weight"] = w["lm_head.weight"]
    for i in range(layers):
        own, their = f"blocks.{i}", f"model.layers.{i}"
        attention = {name: w[f"{their}.self_attn.{name}.weight"] for name in ("q_b_proj", "kv_a_proj_with_mqa")}
        queries = attention["q_b_proj"].view(heads, fixed + turning, -1)
        latent, key = attention["kv_a_proj_with_mqa"].split((32, turning))
        gate_and_up = torch.stack([w[f"{their}.mlp.{name}_proj.weight"] for name in ("gate", "up")])
        ours |= {
            f"{own}.attention_norm.weight": w[f"{their}.input_layernorm.weight"],
            f"{own}.mlp_norm.weight": w[f"{their}.post_attention_layernorm.weight"],
            f"{own}.attention.q_down.weight": w[f"{their}.self_attn.q_a_proj.weight"],
            f"{own}.attention.q_latent_norm.weight": w[f"{their}.self_attn.q_a_layernorm.weight"],
            f"{own}.attention.q_up.weight": torch.cat((halves(queries[:, fixed:]), queries[:, :fixed]), 1).flatten(
                0, 1
            ),
            f"{own}.attention.kv_down.weight": torch.cat((latent, halves(key))),
            f"{own}.attention.kv_latent_norm.weight": w[f"{their}.self_attn.kv_a_layernorm.weight"],
            f"{own}.attention.kv_up.weight": w[f"{their}.self_attn.kv_b_proj.weight"],
            f"{own}.attention.out.weight": w[f"{their}.self_attn.o_proj.weight"],
            f"{own}.mlp.up.weight": gate_and_up,
            f"{own}.mlp.down.weight": w[f"{their}.mlp.down_proj.weight"],
        }
    return ours


def gpt2_pair() -> tuple[Any, RunConfig]:
    theirs = transformers.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=96, n_layer=2, n_head=6)
    return theirs, recipe(layers=2, hidden=96, heads=6, sequence=64)


def llama_pair() -> tuple[Any, RunConfig]:
    """Llama 3.1: grouped queries, rotary positions of base 500,000 scaled by 8."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    theirs = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=176, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=64, rope_parameters=rope, rms_norm_eps=1e-5,
    )  # fmt: skip
    ours = recipe(
        layers=2, hidden=128, heads=8, kv_heads=2, ffn=176, sequence=64, norm="rmsnorm", activation="swiglu",
        position="rotary", rotary_base=500000.0, rotary_scaling="llama3", rotary_factor=8.0, rotary_original=16,
        bias=False, tie_embeddings=False,
    )  # fmt: skip
    return theirs, ours


def deepseek_pair() -> tuple[Any, RunConfig]:
    """DeepSeek-V3 of dense layers: latent attention, values of another size than keys."""
    theirs = transformers.DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=96, intermediate_size=176, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=6, q_lora_rank=40, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
        first_k_dense_replace=2, max_position_embeddings=64, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    ours = recipe(
        layers=2, hidden=96, heads=6, ffn=176, sequence=64, norm="rmsnorm", norm_eps=1e-6, activation="swiglu",
        position="rotary", bias=False, tie_embeddings=False, kv_rank=32, q_rank=40, rope_head_dim=8, nope_head_dim=16,
        value_head_dim=12,
    )  # fmt: skip
    return theirs, ours


def bloom_pair() -> tuple[Any, RunConfig]:
    """BLOOM: ALiBi, here with a number of heads that is no power of two, and a norm behind the embedding."""
    theirs = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=96, n_layer=2, n_head=6)
    return theirs, recipe(layers=2, hidden=96, heads=6, sequence=64, position="alibi", embedding_norm=True)


def logits(mesh: ParallelMesh, config: RunConfig, weights: Weights, tokens: Tensor) -> Tensor:
    model = build_stage(config, VOCAB, mesh)
    names = {spec_of(parameter).name for parameter in model.parameters()}
    assert names == weights.keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(part_of(weights[spec_of(parameter).name], spec_of(parameter)))
        return model(tokens)


@pytest.mark.parametrize(
    ("pair", "translate"),
    [(gpt2_pair, gpt2), (llama_pair, llama), (bloom_pair, bloom), (deepseek_pair, deepseek)],
    ids=["gpt2", "llama", "bloom", "deepseek"],
)
def test_logits_are_those_of_transformers(
    pool: WorkerPool, pair: Callable[[], tuple[Any, RunConfig]], translate: Callable[[Weights], Weights]
) -> None:
    torch.manual_seed(3)
    theirs, ours = pair()
    other = transformers.AutoModelForCausalLM.from_config(theirs).double().eval()
    for parameter in other.parameters():  # larger than at the start, and biases that are not zero
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(VOCAB, (2, TOKENS))
    with torch.no_grad():
        expected = other(tokens).logits
    weights = {name: value.clone() for name, value in translate(dict(other.state_dict())).items()}
    (found,) = pool.run(logits, ours, weights, tokens, layout=RankLayout())
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def further_loss(mesh: ParallelMesh, config: RunConfig, weights: Weights, tokens: Tensor) -> Tensor:
    model = build_stage(config, VOCAB, mesh)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(part_of(weights[spec_of(parameter).name], spec_of(parameter)))
        return model(tokens[:, :-1], tokens[:, 1:], torch.ones_like(tokens[:, 1:], dtype=torch.bool))


def test_losses_of_further_tokens_are_those_of_transformers(pool: WorkerPool) -> None:
    """Two modules, each given what the one before gives the head. Their projection has the embedding in front."""
    torch.manual_seed(4)
    theirs, ours = deepseek_pair()
    ours = recipe(**{**ours.model.model_dump(), "mtp_depth": 2})
    main = transformers.AutoModelForCausalLM.from_config(theirs)
    ahead = transformers.modeling_layers.MtpModel(main, 2)
    for layer in ahead.layers:  # whose experts are not ours, and not there in fp64
        layer.mtp_block.mlp = type(main.model.layers[0].mlp)(theirs)
    main, ahead = main.double().eval(), ahead.double().eval()
    for parameter in {*main.parameters(), *ahead.parameters()}:
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(VOCAB, (2, TOKENS + 1))
    with torch.no_grad():
        hidden = main.model(tokens[:, :-1]).last_hidden_state
        losses = []
        for k in range(3):
            if k > 0:
                places = torch.arange(TOKENS - k)[None]
                hidden = ahead.forward_layer(k - 1, hidden[:, :-1], places, None, input_ids=tokens[:, k:-1])
            logits = main.lm_head(hidden).flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[:, k + 1 :].flatten(), reduction="sum"))
    state = {f"model.{name}": value for name, value in main.model.state_dict().items()}
    state["lm_head.weight"] = main.lm_head.weight
    for k in range(2):
        prefix = f"layers.{k}."
        for name, value in ahead.state_dict().items():
            if name.startswith(prefix):
                state[f"model.layers.{2 + k}.{name.removeprefix(prefix).removeprefix('mtp_block.')}"] = value
    weights = deepseek(state, layers=4)
    for i in (2, 3):
        norms = {"hidden_norm": "hnorm", "embedding_norm": "enorm", "final_norm": "post_norm"}
        for own, their in norms.items():
            weights[f"blocks.{i}.mtp.{own}.weight"] = state[f"model.layers.{i}.{their}.weight"]
        embedded, carried = state[f"model.layers.{i}.eh_proj.weight"].chunk(2, dim=1)
        weights[f"blocks.{i}.mtp.project.weight"] = torch.cat((carried, embedded), dim=1)
    weights = {name: value.detach().clone() for name, value in weights.items()}
    (found,) = pool.run(further_loss, ours, weights, tokens, layout=RankLayout())
    assert float(found) == pytest.approx(float(losses[0] + 0.3 * (losses[1] + losses[2]) / 2), rel=1e-6)


def test_an_attention_layer_of_deepseek_v3_has_its_published_number_of_parameters() -> None:
    module = transformers.models.deepseek_v3.modeling_deepseek_v3
    with torch.device("meta"):
        theirs = module.DeepseekV3Attention(transformers.DeepseekV3Config(), 0)
    ours = recipe(
        layers=1, hidden=7168, heads=128, sequence=4096, kv_rank=512, q_rank=1536, rope_head_dim=64, nope_head_dim=128
    ).model
    assert sum(ours.attention_matrices.values()) == 187_105_280
    assert sum(p.numel() for p in theirs.parameters()) == 187_105_280 + 512 + 1536
