"""Another memory beside a CPU's tensors, in which offloaded activations wait: arrays that torch knows nothing of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from megalm.models import offload


class ArrayMover:
    """Moves tensors of a CPU to arrays and back, at once."""

    def moves(self, x: Tensor) -> bool:
        return x.device.type == "cpu"

    def to_host(self, flats: Sequence[Tensor]) -> tuple[list[tuple[np.ndarray, torch.dtype]], None]:
        return [(flat.view(torch.uint8).numpy().copy(), flat.dtype) for flat in flats], None

    def to_device(self, copies: Sequence[tuple[np.ndarray, torch.dtype]]) -> tuple[list[Tensor], None]:
        return [_tensor(array, dtype) for array, dtype in copies], None

    def wait(self, event: None) -> None:
        pass

    def release(self, flats: Sequence[Tensor]) -> None:
        pass


def _tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    flat = torch.empty(array.size // dtype.itemsize, dtype=dtype)
    flat.view(torch.uint8).numpy()[:] = array
    return flat


@contextmanager
def offloading_on_a_cpu(small: int = 0) -> Iterator[None]:
    """Build models, inside, whose offloaded activations leave a CPU's tensors, those of more than `small` bytes."""
    with (
        mock.patch.object(offload, "mover_of", lambda device: ArrayMover()),
        mock.patch.object(offload, "SMALL", small),
    ):
        yield
