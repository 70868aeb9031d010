"""What can be asked about a scored token.  S scored tokens; nats unless said otherwise."""

import dataclasses
from typing import Literal, NamedTuple, get_args

from jaxtyping import Float32, Int64
from torch import Tensor

Statistic = Literal[
    "logprob",
    "lse",
    "entropy",
    "self_certainty",
    "is_greedy",
    "varentropy",
    "sum_p2",
    "renyi",
    "top1",
    "margin",
    "rank",
    "topk",
    "topk_id",
    "topk_mean",
]
NAMES: tuple[Statistic, ...] = get_args(Statistic)
DIFFERENTIABLE: tuple[Statistic, ...] = ("logprob", "lse", "entropy", "self_certainty")
# not one float a token
IDS_OR_LISTS: tuple[Statistic, ...] = ("top1", "topk", "topk_id")
MAX_K = 32

# which fields of a `Partial` a statistic is made of, beside `top` and `mass`
FIELDS: dict[str, tuple[str, ...]] = {
    "entropy": ("sum_ez",),
    "varentropy": ("sum_ez", "m2"),
    "sum_p2": ("sum_e2",),
    "renyi": ("sum_pow",),
    "self_certainty": ("sum_z", "n_valid"),
    "is_greedy": ("column",),
    "top1": ("column",),
    "margin": ("column", "second"),
    "topk": ("best", "best_column"),
    "topk_id": ("best", "best_column"),
    "topk_mean": ("best", "best_column"),
}


class Wanted(NamedTuple):
    """What a call asks for."""

    names: tuple[str, ...]
    renyi_order: float = 2.0
    k: int = 20

    @property
    def fields(self) -> frozenset[str]:
        """The fields of a `Partial` that answer it, beside `top` and `mass`."""
        return frozenset(field for name in self.names for field in FIELDS.get(name, ()))

    @property
    def numbers(self) -> list[str]:
        """The names of one float a token, in the order asked for."""
        return [name for name in self.names if name not in IDS_OR_LISTS]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStats:
    """Statistics of each scored token that were asked for, `None` for the others.

    With z the logits of the token's row over the vocabulary, p = softmax(z) and n the number of
    unmasked columns (z > -inf), in nats unless said otherwise:

        logprob         z[target] - lse, never above 0
        lse             log sum_v exp(z[v])
        entropy         -sum_v p[v] log p[v]
        self_certainty  KL(uniform over the unmasked columns || p) = lse - mean(z) - log n
        is_greedy       1.0 where the target is the argmax of z (lowest column of a tie), else 0.0
        varentropy      sum_v p[v] (log p[v] + entropy)^2, the variance of -log p; nats squared
        sum_p2          sum_v p[v]^2, the probability that two draws agree; in (0, 1]
        renyi           sum_v p[v]^a for one order a > 0; Renyi's entropy is log(renyi) / (1 - a)
        top1            the argmax of z (lowest column of a tie), an id; -1 where there is none
        margin          largest z minus second largest, 0 in a tie, inf with one unmasked column
        rank            1 + the number of unmasked columns ahead of the target: those of larger z,
                        and those of equal z further left; 1.0 exactly where is_greedy is 1.0
        topk            the k largest log-probabilities, falling; -inf past the unmasked columns
        topk_id         their columns, lowest first of a tie; -1 past the unmasked columns
        topk_mean       the mean of those of unmasked columns (minus it: DeepConf's token
                        confidence, arXiv:2508.15260)

    fp32; fp64 where the input is. Ids are int64: fp32 has none above 2^24.
    """

    logprob: Float32[Tensor, " S"] | None = None
    lse: Float32[Tensor, " S"] | None = None
    entropy: Float32[Tensor, " S"] | None = None
    self_certainty: Float32[Tensor, " S"] | None = None
    is_greedy: Float32[Tensor, " S"] | None = None
    varentropy: Float32[Tensor, " S"] | None = None
    sum_p2: Float32[Tensor, " S"] | None = None
    renyi: Float32[Tensor, " S"] | None = None
    top1: Int64[Tensor, " S"] | None = None
    margin: Float32[Tensor, " S"] | None = None
    rank: Float32[Tensor, " S"] | None = None
    topk: Float32[Tensor, "S k"] | None = None
    topk_id: Int64[Tensor, "S k"] | None = None
    topk_mean: Float32[Tensor, " S"] | None = None

    @classmethod
    def of(cls, found: dict[str, Tensor]) -> "TokenStats":
        """The statistics by name, without a graph where they are not differentiable."""
        return cls(**{n: x if n in DIFFERENTIABLE else x.detach() for n, x in found.items()})
