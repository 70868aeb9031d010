"""The states of Metropolis-Hastings chains over completions, and the ratio that accepts a move.

A move from x to x' picks a cut c, keeps the first c tokens of x and draws the rest up to its end
from the proposal q. The cut is uniform over the T tokens of x, so the way back picks it with
probability 1 / T' instead of 1 / T, and draws the *whole* rest of x:

    log r = alpha (log p(x') - log p(x)) + log q(x from c) - log q(x' from c) + log T - log T'

With probability min(1, r) for a move, p^alpha is in detailed balance for each c alone.

B chains, T most new tokens.
"""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from .draw_step import results
from .protocol import FinishReason


@dataclass(frozen=True, eq=False)
class Chains:
    """One completion a chain.

    Attributes:
        token: Anything behind a completion's end.
        logprob: Of each token under the model, nats.
        proposal: Of each token under the proposal, nats.
        count: Tokens of each completion, its end token among them.
        is_open: Whether it was cut at T.
        is_nan: Whether the model's logits were NaN.
    """

    token: Int64[Tensor, "B T"]
    logprob: Float32[Tensor, "B T"]
    proposal: Float32[Tensor, "B T"]
    count: Int64[Tensor, " B"]
    is_open: Bool[Tensor, " B"]
    is_nan: Bool[Tensor, " B"]

    def total(
        self, of: Float32[Tensor, "B T"], start: Int64[Tensor, " B"]
    ) -> Float64[Tensor, " B"]:
        """Sum over the tokens from `start` to the end of each completion."""
        t_T = torch.arange(of.shape[1], device=of.device)
        is_inside_BT = (t_T >= start[:, None]) & (t_T < self.count[:, None])
        return of.double().masked_fill(~is_inside_BT, 0.0).sum(dim=1)

    def moved(self, to: "Chains", where: Bool[Tensor, " B"]) -> "Chains":
        """`to` where it says so, and these elsewhere."""
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        return Chains(
            **{
                name: torch.where(where.view(-1, *[1] * (x.dim() - 1)), getattr(to, name), x)
                for name, x in mine.items()
            }
        )

    def results(self) -> tuple[list[list[int]], list[list[float]], list[FinishReason]]:
        """Ids, log-probs and finish reason of every chain."""
        return results(self.token, self.logprob, self.count, self.is_open, self.is_nan)


def log_ratio(
    old: Chains, new: Chains, cut: Int64[Tensor, " B"], alpha: float
) -> Float64[Tensor, " B"]:
    """The log of r of the moves from `old` to `new`; at alpha = inf, +inf where `new` is likelier.

    Args:
        old: Where the chains are.
        new: Where they may go: the same tokens before the cut.
        cut: The number of these tokens.
        alpha: Power of the target.
    """
    # the tokens before the cut are the same, and so are their log-probs
    gain_B = new.total(new.logprob, cut) - old.total(old.logprob, cut)
    if math.isinf(alpha):
        return torch.where(gain_B > 0, math.inf, -math.inf).double()
    back_B, there_B = old.total(old.proposal, cut), new.total(new.proposal, cut)
    return alpha * gain_B + back_B - there_B + old.count.double().log() - new.count.double().log()
