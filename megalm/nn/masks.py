"""What layers and kernels must know to leave elements out: dropout's masks, and the documents of packed rows.

A mask is a function of seed, step, the place's name and an element's place in the whole batch and model, so that it is
the same in every layout and when a block is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.distributed.places import Places
from megalm.distributed.random import keep_slice, key


@dataclass(frozen=True)
class DropoutKeys:
    """What a forward pass must know to draw its masks.

    `first_sample` is the index within the step's global batch of the first row of this microbatch. `words` holds the
    same as a tensor: a compiled graph would take the numbers for constants.
    """

    seed: int
    step: int
    first_sample: int
    words: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Put the numbers into a tensor."""
        object.__setattr__(self, "words", torch.tensor((self.seed, self.step, self.first_sample)))


@dataclass(frozen=True)
class Site:
    """A place of the model where elements are dropped, by its name; `letters` is for graphs that many blocks share."""

    name: str
    letters: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Put the name into a tensor."""
        object.__setattr__(self, "letters", torch.tensor(tuple(self.name.encode()), dtype=torch.uint8))


@dataclass(frozen=True)
class Drop:
    """The dropout of one site in one forward pass: which elements fall is a function of these values alone.

    The tensor holds tokens (heads) from `first` on, of `whole` ones in a sample (in the model). Tokens of several runs
    are said by `places`, which the operations take one by one.
    """

    rate: float
    site: Site
    keys: DropoutKeys
    first: int
    whole: int
    places: Places = ()

    @property
    def stream(self) -> int:
        """The Philox key of seed, site and step."""
        return key(self.keys.seed, "dropout", self.site.name, self.keys.step)

    @property
    def origin(self) -> tuple[int, int, int]:
        """The place in the site's logical tensor.

        (first sample, first token, tokens of a whole sample) for [B, T, D], (first sample, first head, heads of the
        whole model) for attention probabilities [B, H, T, S].
        """
        return self.keys.first_sample, self.first, self.whole


def kept(
    keys: DropoutKeys, site: Site, rate: float, shape: Sequence[int], starts: Sequence[int], like: Tensor
) -> Tensor:
    """Return which elements of a slice of a site's logical tensor [samples, *shape] stay: bool.

    The slice begins at sample `keys.first_sample` and at `starts`, has the shape of as many of `like`'s dims, and lies
    on its device.
    """
    lengths = like.shape[: len(shape) + 1]
    if torch.compiler.is_compiling():
        return _kept(keys.words, site.letters, rate, shape, starts, lengths, like.device)
    first, stream = keys.first_sample, key(keys.seed, "dropout", site.name, keys.step)
    return keep_slice(stream, rate, (first + lengths[0], *shape), (first, *starts), lengths, like.device)


@torch.library.custom_op("megalm::kept", mutates_args=())
def _kept(
    words: Tensor,
    letters: Tensor,
    rate: float,
    shape: Sequence[int],
    starts: Sequence[int],
    lengths: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Return the mask of `kept` by keys and site in tensors on the CPU; a graph keeps the call as it is."""
    seed, step, first = words.tolist()
    stream = key(seed, "dropout", bytes(letters.tolist()).decode(), step)
    return keep_slice(stream, rate, (first + lengths[0], *shape), (first, *starts), lengths, device)


_kept.register_fake(lambda *how: torch.empty(tuple(how[-2]), dtype=torch.bool, device=how[-1]))


def document_starts(numbers_BT: Tensor) -> Tensor:
    """Return where each document of all rows, laid end to end, begins, int32, and then B T up to length B T + 1.

    The length does not depend on the documents, so that nothing waits for the device.
    """
    begins_BT = torch.ones_like(numbers_BT, dtype=torch.bool)
    begins_BT[:, 1:] = numbers_BT[:, 1:] != numbers_BT[:, :-1]
    end = begins_BT.numel()
    places_N = torch.arange(end, dtype=torch.int32, device=begins_BT.device)
    return F.pad(places_N.masked_fill(~begins_BT.flatten(), end).sort().values, (0, 1), value=end)


@dataclass(frozen=True)
class Documents:
    """Texts that are packed into rows: `numbers_BT` (integers) says which document of its row a token belongs to.

    Those of a document stand side by side, the numbers of a row rise. `starts` are `document_starts` of the numbers,
    for the kernels: made once for all layers.
    """

    numbers_BT: Tensor
    starts: Tensor | None = None

    @property
    def visible_BTS(self) -> Tensor:
        """Return which keys are of a query's own document: bool."""
        return self.numbers_BT[:, :, None] == self.numbers_BT[:, None, :]
