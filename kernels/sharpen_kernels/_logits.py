"""What both routes of `token_logprob` share: how logits are read, what a row leaves behind.

R rows of logits, S (row, target) pairs, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._rows import Pairs

DIFFERENTIABLE = ("logprob", "lse", "entropy", "self_certainty")


class Read(NamedTuple):
    """How logits become those of the distribution: softcap(z) / temperature, then the mask."""

    temperature: float
    softcap: float | None
    vocab_size: int
    vocab_mask: Tensor | None  # [>= vocab_size] bool, True where a column counts


class LogitRows(NamedTuple):
    """Statistics of R rows of logits; `None` where not asked for.  lse = top + log_mass."""

    top: Tensor  # [R] maximum of z, -inf where every column is masked
    log_mass: Tensor  # [R] log of the sum of exp(z - top), NaN where the row holds a NaN
    entropy: Tensor | None = None
    self_certainty: Tensor | None = None
    n_valid: Tensor | None = None  # [R] number of unmasked columns, as a float
    varentropy: Tensor | None = None
    sum_p2: Tensor | None = None
    margin: Tensor | None = None
    top1: Tensor | None = None  # [R] int64, -1 where there is none

    def state(self) -> Tensor:
        """What backward reads [4, R]: top, log_mass, entropy, n_valid; 0 where not computed."""
        zero = torch.zeros_like(self.top)
        kept = (self.top, self.log_mass, self.entropy, self.n_valid)
        return torch.stack([zero if x is None else x for x in kept])


def pair_values(
    stats: list[str],
    rows: LogitRows,
    chosen: Tensor,
    rank: Tensor | None,
    pairs: Pairs,
    V: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Values [K, S] of the asked statistics but `top1`, and `top1` [S], [0] if not asked for.

    `chosen` and `rank` [S] are of the target, in the order of the pairs; the rest in the caller's.
    """
    R = rows.top.shape[0]
    row = pairs.row.clamp(0, R - 1)

    def of_pair(x: Tensor | None) -> Tensor:
        assert x is not None
        return x if pairs.order is None else x[row]

    nan = float("nan")
    inside, ignored = pairs.counted(R, V, ignore_index)
    has_value = of_pair(rows.log_mass).isfinite()
    values = []
    for name in stats:
        if name == "logprob":
            # both terms come from the same logits: the first is <= 0, the second >= 0
            value = (chosen - of_pair(rows.top)) - of_pair(rows.log_mass)
        elif name == "lse":
            value = of_pair(rows.top + rows.log_mass)
        elif name == "is_greedy":
            value = (of_pair(rows.top1) == pairs.target).to(chosen.dtype)
            value = value.masked_fill(~has_value, nan)
        elif name == "rank":
            assert rank is not None
            value = rank.to(chosen.dtype).masked_fill(~has_value, nan)
        elif name == "top1":
            continue
        else:
            value = of_pair(getattr(rows, name))
        values.append(value)
    found = torch.stack(values) if values else chosen.new_zeros((0, chosen.shape[0]))
    found = found.masked_fill(~inside, nan).masked_fill(ignored, 0.0)
    if "top1" not in stats:
        return pairs.unsort(found), pairs.target.new_zeros(0)
    top1 = of_pair(rows.top1).masked_fill(~inside, -1)
    return pairs.unsort(found), pairs.unsort(top1[None])[0]
