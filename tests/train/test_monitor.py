"""Counting against published models and hand-written sums; the meter against a clock that the test moves."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

from megalm.config.load import load_recipe
from megalm.config.run import ModelSection
from megalm.config.storage import muon_parameters
from megalm.distributed.sharding import ShardSpec
from megalm.train.monitor import (
    Peak,
    Throughput,
    count_parameters,
    flops_per_token,
    known_peak,
    peak_flops,
    peak_memory_bytes,
)
from megalm.train.optimizers import is_hidden_matrix, treatment
from tests.parity.harness import VOCAB
from tests.parity.options import covering_array
from tests.parity.reference_model import parameter_shapes

GPT2 = ModelSection(layers=12, hidden=768, heads=12, sequence=1024)
LLAMA3_8B = ModelSection(
    layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, sequence=8192, norm="rmsnorm",
    activation="swiglu", position="rotary", bias=False, tie_embeddings=False,
)  # fmt: skip


def test_gpt2_has_its_published_number_of_parameters() -> None:
    assert count_parameters(GPT2, 50257).total == 124_439_808


def test_llama3_8b_has_its_published_number_of_parameters() -> None:
    assert count_parameters(LLAMA3_8B, 128256).total == 8_030_261_248


def test_mixtral_8x7b_has_its_published_numbers_of_parameters() -> None:
    """46.7 billion, of which a token uses 12.9 (Jiang et al. 2024, section 2.1)."""
    model = load_recipe("mixtral-8x7b").model
    count = count_parameters(model, 32000)
    assert (count.total, count.active) == (46_702_792_704, 12_879_925_248)
    norms_and_embedding = count.norms + count.embedding
    assert flops_per_token(model, 32000) == 6 * (count.active - norms_and_embedding) + 12 * 32 * 4096 * model.sequence


def test_each_part_is_counted_with_its_biases() -> None:
    model = ModelSection(layers=2, hidden=8, heads=4, kv_heads=2, ffn=24, sequence=16, tie_embeddings=False)
    count = count_parameters(model, 11)
    assert (count.embedding, count.position, count.head) == (88, 128, 88)
    assert count.attention == 2 * ((8 + 2 * 4) * 8 + 16 + 8 * 8 + 8)
    assert count.mlp == 2 * (24 * 8 + 24 + 8 * 24 + 8)
    assert count.norms == 5 * 16


def test_every_option_is_counted() -> None:
    for case in covering_array():
        config = case.config()
        shapes = parameter_shapes(config.model, VOCAB)
        assert count_parameters(config.model, VOCAB).total == sum(map(math.prod, shapes.values())), case.name


def test_hidden_matrices_are_those_of_the_blocks_with_every_option() -> None:
    for case in covering_array():
        config = case.config()
        shapes = parameter_shapes(config.model, VOCAB)
        specs = [ShardSpec.whole(name, shape) for name, shape in shapes.items()]
        expected = {spec.name: math.prod(spec.global_shape) for spec in specs if is_hidden_matrix(spec)}
        assert config.model.hidden_matrices == expected, case.name
        optim = config.optim
        if optim.kind == "muon":
            trained = [s for s in specs if (rule := optim.rule_of(s.name)) is None or not rule.freeze]
            muons = sum(math.prod(s.global_shape) for s in trained if treatment(optim, s).muon)
            assert muon_parameters(config) == muons, case.name


def test_flops_agree_with_megatrons_formula() -> None:
    # Narayanan et al. 2021, equation 2: 96 s l h^2 (1 + s/6h + V/16lh) a sequence, with the forward pass
    # recomputed; without, the blocks' part is 72/96 of it and the head's, which is not recomputed there,
    # stays.
    s, layers, h, vocab = 1024, 12, 768, 50257
    blocks = 72 * s * layers * h**2 * (1 + s / (6 * h))
    head = 96 * s * layers * h**2 * vocab / (16 * layers * h)
    assert flops_per_token(GPT2, vocab) * s == pytest.approx(blocks + head, rel=1e-12)


def test_flops_count_fewer_key_value_heads_and_a_gated_mlp() -> None:
    weights = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336) + 128256 * 4096
    assert flops_per_token(LLAMA3_8B, 128256) == 6 * weights + 12 * 32 * 4096 * 8192


def test_flops_of_further_tokens_are_those_of_a_block_a_projection_and_the_head_again() -> None:
    further = GPT2.model_copy(update={"mtp_depth": 2})
    block = 12 * 768**2
    added = 2 * (block + 2 * 768**2 + 50257 * 768)
    scores = 2 * 12 * 768 * 1024
    assert flops_per_token(further, 50257) == flops_per_token(GPT2, 50257) + 6 * added + scores


def test_flops_of_latent_attention_are_those_of_its_matrices_and_of_both_sizes_of_a_head() -> None:
    """DeepSeek-V2-Lite's attention: queries without a rank, 192 features of a key, 128 of a value."""
    model = ModelSection(
        layers=27, hidden=2048, heads=16, ffn=10944, sequence=4096, activation="swiglu", position="rotary",
        kv_rank=512, rope_head_dim=64, nope_head_dim=128, value_head_dim=128,
    )  # fmt: skip
    attention = 2048 * 16 * 192 + 2048 * (512 + 64) + 512 * 16 * (128 + 128) + 16 * 128 * 2048
    weights = 27 * (attention + 3 * 2048 * 10944) + 102400 * 2048
    assert flops_per_token(model, 102400) == 6 * weights + 6 * 27 * 16 * (192 + 128) * 4096


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "fp32", 67.0),
        ("NVIDIA B200", "bf16", 2250.0),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L4", "tf32", 60.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-32GB", "fp16", 125.0),
    ],
)
def test_known_gpus_have_their_data_sheets_peak(name: str, precision: str, tflops: float) -> None:
    peak = known_peak(name, precision)
    assert peak is not None and peak.flops == pytest.approx(tflops * 1e12)
    assert "data sheet" in peak.source


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("Tesla V100-SXM2-32GB", "bf16"),
        ("NVIDIA L400", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
    ],
)
def test_what_the_table_lacks_has_no_known_peak(name: str, precision: str) -> None:
    assert known_peak(name, precision) is None


@pytest.mark.flaky(reruns=2)  # measures time beside whatever else the machine does
def test_cpu_peak_is_measured_in_little_time_and_says_so() -> None:
    begin = time.perf_counter()
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - begin < 2.0
    assert 1e8 < peak.flops < 1e14
    assert peak.source.startswith("measured")


def test_peak_memory_grows_with_what_is_touched() -> None:
    device = torch.device("cpu")
    before = peak_memory_bytes(device)
    held = np.ones(before + 50 * 2**20, dtype=np.uint8)
    assert peak_memory_bytes(device) >= held.nbytes


class Clock:
    """A clock that moves when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_meter_gives_the_mean_over_the_steps_since_the_last_measurement() -> None:
    clock = Clock()
    meter = Throughput(
        tokens_before=lambda step: 1000 * step,
        flops_per_token=lambda _: 1e9,
        world_size=4,
        peak=Peak(1e12, "test"),
        clock=clock,
    )
    meter.start(10)
    clock.now += 8.0
    speed = meter.measure(14, last_step=20)
    assert (speed.step_s, speed.tokens_per_s, speed.tflops_total) == (2.0, 500.0, 0.5)
    assert (speed.tflops, speed.mfu, speed.time_left_s) == (0.125, 0.125, 12.0)
    assert speed.record() == {
        "time/step_s": 2.0, "perf/tokens_per_s": 500.0, "perf/tflops": 0.125, "perf/mfu": 0.125
    }  # fmt: skip


def test_paused_time_does_not_count() -> None:
    clock = Clock()
    meter = Throughput(tokens_before=int, flops_per_token=float, world_size=1, peak=Peak(1.0, "test"), clock=clock)
    meter.start(0)
    with meter.paused():
        clock.now += 50.0
    clock.now += 3.0
    assert meter.measure(1, last_step=1).step_s == pytest.approx(3.0)
    clock.now += 1.0
    assert meter.measure(2, last_step=2).step_s == pytest.approx(1.0)


def test_a_pause_within_a_pause_does_not_count_twice() -> None:
    clock = Clock()
    meter = Throughput(tokens_before=int, flops_per_token=float, world_size=1, peak=Peak(1.0, "test"), clock=clock)
    meter.start(0)
    clock.now += 3.0
    with meter.paused():
        clock.now += 20.0
        meter.pause()
        clock.now += 10.0
        meter.go_on()
        clock.now += 20.0
    meter.pause()
    clock.now += 5.0
    meter.go_on()
    assert meter.measure(1, last_step=1).step_s == pytest.approx(3.0)


def test_time_left_forgets_the_first_step_and_weighs_the_others() -> None:
    clock = Clock()
    meter = Throughput(tokens_before=int, flops_per_token=float, world_size=1, peak=Peak(1.0, "test"), clock=clock)
    meter.start(0)
    left = []
    for step, seconds in [(1, 60.0), (2, 1.0), (3, 11.0), (5, 4.0)]:
        clock.now += seconds
        left.append(meter.measure(step, last_step=15).time_left_s)
    # Of 60, 1, 0.9 * 1 + 0.1 * 11 and 0.81 * 2 + 0.19 * 2 seconds a step.
    assert left == pytest.approx([14 * 60.0, 13 * 1.0, 12 * 2.0, 10 * 2.0])
