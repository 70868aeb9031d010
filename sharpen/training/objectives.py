"""An objective: from the token log-probs of a batch to the scalar that a step lowers."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Float64
from torch import Tensor

from .checks import check_beta, check_choice, check_optimism
from .groups import Batch
from .losses import Per, dpo_loss, nll, sequence_sums, square_loss, xpo_loss

# log-probs [S] of a batch under the policy, and the batch
Objective = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class Likelihood:
    """Fit the weighted completions: SFT-Sharpening, power self-distillation. See `nll`."""

    per: Per = "token"

    def __post_init__(self) -> None:
        """Refuse what is no mean."""
        check_choice("per", self.per, Per)

    def __call__(self, logprob: Float[Tensor, " S"], batch: Batch) -> Float64[Tensor, ""]:
        """The loss of a batch."""
        return nll(logprob, batch.offsets, batch.weight, per=self.per)


@dataclass(frozen=True)
class Square:
    """Fit implicit to given reward differences: RLHF-Sharpening, and XPO. See `xpo_loss`."""

    beta: float
    optimism: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what has no optimum."""
        check_beta(self.beta)
        check_optimism("optimism", self.optimism)

    def __call__(self, logprob: Float[Tensor, " S"], batch: Batch) -> Float64[Tensor, ""]:
        """The loss of a batch."""
        logprob_N = sequence_sums(logprob, batch.offsets)
        if self.optimism == 0:
            log_ratio_N = logprob_N - batch.reference.to(logprob_N)
            return square_loss(log_ratio_N, batch.reward, batch.pairs, beta=self.beta)
        return xpo_loss(
            logprob_N, batch.reference, batch.reward, batch.pairs,
            beta=self.beta, optimism=self.optimism,
        )  # fmt: skip


@dataclass(frozen=True)
class Dpo:
    """Prefer the first of each pair. See `dpo_loss`."""

    beta: float

    def __post_init__(self) -> None:
        """Refuse what has no optimum."""
        check_beta(self.beta)

    def __call__(self, logprob: Float[Tensor, " S"], batch: Batch) -> Float64[Tensor, ""]:
        """The loss of a batch."""
        logprob_N = sequence_sums(logprob, batch.offsets)
        return dpo_loss(logprob_N - batch.reference.to(logprob_N), batch.pairs, beta=self.beta)
