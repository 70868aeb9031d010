"""What can be asked about a scored token.  S scored tokens; nats, but for `is_greedy`."""

import dataclasses
from typing import Literal, get_args

from jaxtyping import Float32
from torch import Tensor

Statistic = Literal["logprob", "lse", "entropy", "self_certainty", "is_greedy"]
NAMES: tuple[Statistic, ...] = get_args(Statistic)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStats:
    """One value per scored token for each statistic that was asked for, `None` for the others.

    With z the logits of the token's row over the vocabulary, p = softmax(z) and n the number of
    unmasked columns (z > -inf), in nats unless said otherwise:

        logprob         z[target] - lse, never above 0
        lse             log sum_v exp(z[v])
        entropy         -sum_v p[v] log p[v]
        self_certainty  KL(uniform over the unmasked columns || p) = lse - mean(z) - log n
        is_greedy       1.0 where the target is the argmax of z (lowest column of a tie), else 0.0

    fp32; fp64 where the hidden rows or the weight are.
    """

    logprob: Float32[Tensor, " S"] | None = None
    lse: Float32[Tensor, " S"] | None = None
    entropy: Float32[Tensor, " S"] | None = None
    self_certainty: Float32[Tensor, " S"] | None = None
    is_greedy: Float32[Tensor, " S"] | None = None
