"""What can be asked about a scored token.  S scored tokens; nats unless said otherwise."""

import dataclasses
from typing import Literal, get_args

from jaxtyping import Float32, Int64
from torch import Tensor

Statistic = Literal["logprob", "lse", "entropy", "self_certainty", "is_greedy"]
NAMES: tuple[Statistic, ...] = get_args(Statistic)
# what logits that are there to be read can be asked as well
LogitStatistic = Literal[
    "logprob", "lse", "entropy", "self_certainty", "is_greedy",
    "varentropy", "sum_p2", "top1", "margin", "rank",
]  # fmt: skip
LOGIT_NAMES: tuple[LogitStatistic, ...] = get_args(LogitStatistic)


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
        varentropy      sum_v p[v] (log p[v] + entropy)^2, the variance of -log p; nats squared
        sum_p2          sum_v p[v]^2, the probability that two draws agree; in (0, 1]
        top1            the argmax of z (lowest column of a tie), an id; -1 where there is none
        margin          largest z minus second largest, 0 in a tie, inf with one unmasked column
        rank            1 + the number of unmasked columns ahead of the target: those of larger z,
                        and those of equal z further left; 1.0 exactly where is_greedy is 1.0

    fp32; fp64 where the input is. `top1` is int64: fp32 has no ids above 2^24.
    """

    logprob: Float32[Tensor, " S"] | None = None
    lse: Float32[Tensor, " S"] | None = None
    entropy: Float32[Tensor, " S"] | None = None
    self_certainty: Float32[Tensor, " S"] | None = None
    is_greedy: Float32[Tensor, " S"] | None = None
    varentropy: Float32[Tensor, " S"] | None = None
    sum_p2: Float32[Tensor, " S"] | None = None
    top1: Int64[Tensor, " S"] | None = None
    margin: Float32[Tensor, " S"] | None = None
    rank: Float32[Tensor, " S"] | None = None
