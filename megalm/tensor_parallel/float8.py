"""The products of a linear layer in fp8 (Micikevicius et al. 2022), through torchao: the only import of its float8.

A product's operands are multiplied by scales, rounded to 8 bits (e4m3; tensorwise, gradients to e5m2) and multiplied,
with sums in fp32. All else stays in bf16: weights, what is kept for the backward pass, results and gradients.

Scales are powers of two, in every recipe, so that they change no digit: a number is rounded alike under any scale under
which it stays above 2^-6, where e4m3's digits end. Scaled, the largest number that shares the scale is above 2^7, so
these are all numbers down to a 2^13th of it. How a layout or a microbatch parts the numbers that share a scale
matters for smaller ones alone, by less than a 2^16th of the largest.

torchao's public modules take the place of `nn.Linear`, which our layers are not. What is used instead is what they are
made of (the same in versions 0.17 and 0.18, which setup.py asks for): recipes, the cast, and a tensor whose `torch.mm`
is the scaled product.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megalm.errors import ConfigError


class Float8Products:
    """y = x W^T and the two products of its backward pass, as torchao's recipe of that name rounds their operands.

    x [..., K], weight [F, K], gradient (of y) [..., F], all of one dtype, bf16 in a run; the leading dims are flattened
    to N. K and F, and N for the gradient of a weight, must be multiples of 16. On the meta device they give shapes.
    Raises ConfigError where torchao cannot be imported. With `emulate` products are fp32's of the rounded operands.
    """

    def __init__(self, recipe: str, emulate: bool = False) -> None:
        with quiet_torchao():
            try:
                from torchao.float8 import (
                    Float8LinearConfig,
                    GemmInputRole,
                    LinearMMConfig,
                    ScaledMMConfig,
                    ScalingGranularity,
                    ScalingType,
                    convert_to_float8_training,
                )
                from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
            except ImportError as error:
                raise ConfigError(
                    f"train.fp8={recipe} computes by torchao, which cannot be imported here ({error}); "
                    "pip install 'megalm[fp8]', or use train.fp8=none"
                ) from error
        self.recipe = recipe
        self.config = replace(Float8LinearConfig.from_recipe_name(recipe), round_scales_to_power_of_2=True)
        convert_to_float8_training(nn.Sequential(), config=self.config)  # changes Inductor, whose stores of fp8 fail
        gemms = (
            self.config.gemm_config_output,
            self.config.gemm_config_grad_input,
            self.config.gemm_config_grad_weight,
        )
        self._products = LinearMMConfig(*(ScaledMMConfig(emulate, gemm.use_fast_accum) for gemm in gemms))
        self._to_float8, self._roles = hp_tensor_to_float8_dynamic, GemmInputRole
        self._unrounded, self._by_rows = ScalingType.DISABLED, ScalingGranularity.AXISWISE

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b, as `F.linear` does, with gradients."""
        y: Tensor = _Float8Linear.apply(x, weight, self)
        return y if bias is None else y + bias

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x W^T; scales by rows are those of tokens and of output features."""
        config, role = self.config, self._roles
        x_NK = self._rounded(x.flatten(0, -2), config.cast_config_input, role.INPUT, -1)
        w_KF = self._rounded(weight.t(), config.cast_config_weight, role.WEIGHT, 0)
        return torch.mm(x_NK, w_KF).view(*x.shape[:-1], -1)

    def input_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Return dx = dy W; scales by rows are those of tokens and of input features."""
        config, role = self.config, self._roles
        dy_NF = self._rounded(gradient.flatten(0, -2), config.cast_config_grad_output, role.GRAD_OUTPUT, -1)
        w_FK = self._rounded(weight, config.cast_config_weight_for_grad_input, role.WEIGHT, 0)
        return torch.mm(dy_NF, w_FK).view(*gradient.shape[:-1], -1)

    def weight_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return dW = dy^T x, a sum over tokens; scales by rows are those of output and of input features."""
        config, role = self.config, self._roles
        dy_FN, x_NK = gradient.flatten(0, -2).t(), x.flatten(0, -2)
        dy_FN = self._rounded(dy_FN, config.cast_config_grad_output_for_grad_weight, role.GRAD_OUTPUT, -1)
        x_NK = self._rounded(x_NK, config.cast_config_input_for_grad_weight, role.INPUT, 0)
        return torch.mm(dy_FN, x_NK)

    def check(self, device: torch.device) -> None:
        """Raise ConfigError where the device cannot compute a product: for some torch has no kernel by rows."""
        square = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
        try:
            for product in (self.output, self.input_gradient, self.weight_gradient):
                product(square, square)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except RuntimeError as error:
            others = "rowwise needs newer ones than tensorwise, so use train.fp8=tensorwise or none"
            raise ConfigError(
                f"train.fp8={self.recipe} is not computed by this {device.type} device ({str(error).splitlines()[0]}); "
                + ("use train.fp8=none" if self.recipe == "tensorwise" else others)
            ) from error

    def _rounded(self, matrix: Tensor, cast: Any, role: Any, reduced: int) -> Tensor:
        """Return an operand as the recipe's `cast` has it; rows that have a scale each go along the dim `reduced`."""
        if cast.scaling_type is self._unrounded:
            return matrix
        return self._to_float8(
            matrix,
            cast.target_dtype,
            self._products,
            gemm_input_role=role,
            scaling_granularity=cast.scaling_granularity,
            axiswise_dim=reduced if cast.scaling_granularity is self._by_rows else None,
            round_scales_to_power_of_2=self.config.round_scales_to_power_of_2,
        )


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: Float8Products) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products = products
        return products.output(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), products = ctx.saved_tensors, ctx.products
        of_x, of_weight, _ = ctx.needs_input_grad
        return (
            products.input_gradient(gradient, weight) if of_x else None,
            products.weight_gradient(gradient, x) if of_weight else None,
            None,
        )


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Import torchao inside without its words about kernels for other things, which it cannot load everywhere."""
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    # Its version warns of those kernels all the same, and of the types that it registers.
    noisy = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
