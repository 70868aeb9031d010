"""What turns rows into the logits of a distribution, and the gradient of one such logit.

    z = softcap(u) / temperature, -inf where masked,    softcap(u) = c tanh(u / c)

with u = x W^T + b of a linear head (`Head`), or logits that are given (`Transform` alone).

R rows, S (row, target) pairs, V vocabulary, D hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._state import finite_shift
from .stats import DIFFERENTIABLE


class Transform(NamedTuple):
    """How raw logits u become those of the distribution: softcap(u) / temperature, then a mask."""

    temperature: float
    softcap: float | None
    vocab_size: int
    vocab_mask: Tensor | None = None  # [>= vocab_size] bool, True where a column counts

    def apply_(self, u: Tensor, masked: Tensor | None) -> Tensor:
        """The logits z in the memory of `u`; `masked` [v] are the columns that do not count."""
        if self.softcap is not None:
            u.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            u.div_(self.temperature)
        return u if masked is None else u.masked_fill_(masked, float("-inf"))

    def chain_(self, dz: Tensor, z: Tensor) -> Tensor:
        """Gradient of u from that of z, in the memory of `dz`."""
        if self.softcap is not None:
            dz *= 1 - (z * (self.temperature / self.softcap)).square_()
            if self.vocab_mask is not None:
                # z = -inf there, and 0 * -inf is nan
                dz.masked_fill_(z == float("-inf"), 0.0)
        if self.temperature != 1.0:
            dz /= self.temperature
        return dz


class Head(NamedTuple):
    """A linear head: the logits of a row x are `transform` of x W^T + b."""

    weight: Tensor
    bias: Tensor | None
    transform: Transform

    @property
    def vocab_size(self) -> int:
        """Columns of the vocabulary; rows of the weight from there on are padding."""
        return self.transform.vocab_size


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """What sums are kept in and values returned in: fp32, or fp64 where an input is."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


class RowGrads:
    """Coefficients of one logit's gradient, a value a row, padded to `size` rows.

    A row that no gradient reaches gets log_mass = inf, so p = 0: it adds exact zeros to every
    sum, NaN in its hidden row or not.
    """

    def __init__(self, grads: dict[str, Tensor], state: Tensor, row: Tensor, size: int):
        R = state.shape[1]
        safe = row.clamp(0, R - 1)

        def per_row(x: Tensor) -> Tensor:
            return _add_at(state.new_zeros(R), safe, x)

        reached = torch.stack(list(grads.values())) != 0
        active = per_row(reached.any(dim=0).to(state.dtype)) > 0

        def padded(x: Tensor, fill: float = 0.0) -> Tensor:
            out = state.new_full((size, 1), fill)
            out[:R, 0] = torch.where(active, x, fill)
            return out

        top, log_mass, entropy, n_valid = state
        sums = {name: per_row(g) for name, g in grads.items()}
        zero = state.new_zeros(R)
        prob = sums.get("lse", zero) + sums.get("self_certainty", zero)
        self.active = padded(active.to(state.dtype)) > 0  # [size, 1], as all below
        self.top = padded(finite_shift(top))
        self.log_mass = padded(log_mass, float("inf"))
        self.prob = padded(prob - sums.get("logprob", zero))
        self.entropy = padded(entropy)
        self.of_entropy = padded(sums["entropy"]) if "entropy" in sums else None
        certain = "self_certainty" in sums
        self.uniform = padded(sums["self_certainty"] / n_valid) if certain else None

    def dlogits(self, z: Tensor, block: slice) -> Tensor:
        """Gradient of the logits `z` [B, v] of a block, but for the targets' own term."""
        log_p = (z - self.top[block]).sub_(self.log_mass[block])
        p = log_p.exp()
        dz = p * self.prob[block]
        if self.of_entropy is not None:
            # dH / dz = -p (log p + H), 0 in a masked column, where log p = -inf
            log_p.clamp_(min=torch.finfo(z.dtype).min).add_(self.entropy[block])
            dz -= p.mul_(log_p).mul_(self.of_entropy[block])
        if self.uniform is not None:
            dz -= (z > float("-inf")) * self.uniform[block]
        return dz


def nonzero_grads(grads: Tensor) -> dict[str, Tensor]:
    """Of `grads` [4, S], in the order of `DIFFERENTIABLE`, logprob's and those that are not all 0.

    Waits for the device.
    """
    named = zip(DIFFERENTIABLE, grads, strict=True)
    return {name: x for name, x in named if name == "logprob" or bool(x.any())}


def add_chosen(dz: Tensor, z: Tensor, row: Tensor, column: Tensor, grad: Tensor) -> None:
    """Add `grad` at the targets that lie in this segment; a masked target gets none."""
    v = z.shape[1]
    here = (column >= 0) & (column < v)
    index = row * v + column.clamp(0, v - 1)
    here &= z.view(-1)[index] > float("-inf")
    _add_at(dz.view(-1), index, torch.where(here, grad, 0.0))


def _add_at(out: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """`out[index] += value` for 1-D tensors; repeated indices are summed in a fixed order."""
    if out.is_cuda:
        # index_add_ there is atomic; this sorts first
        return out.index_put_((index,), value, accumulate=True)
    return out.index_add_(0, index, value)
