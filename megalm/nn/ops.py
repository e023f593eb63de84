"""The operations of the model, each chosen in one place: the only import of `megalm.kernels`.

A fused kernel for an operation takes its line here; every caller stays as it is.
"""

from megalm.kernels.reference import (
    apply_rotary,
    flash_attention,
    gelu,
    layer_norm,
    rms_norm,
    swiglu,
)

__all__ = ["apply_rotary", "flash_attention", "gelu", "layer_norm", "rms_norm", "swiglu"]
