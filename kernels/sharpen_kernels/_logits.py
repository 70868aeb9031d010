"""How logits that are there are read."""

from typing import NamedTuple

from torch import Tensor


class Read(NamedTuple):
    """How logits become those of the distribution: softcap(z) / temperature, then the mask."""

    temperature: float
    softcap: float | None
    vocab_size: int
    vocab_mask: Tensor | None  # [>= vocab_size] bool, True where a column counts
