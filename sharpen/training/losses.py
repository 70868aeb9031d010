"""What a step lowers: losses of log-probabilities, and the objectives that apply them to a batch.

    nll, square_loss, xpo_loss, dpo_loss     pure functions, in nats, differentiable, summed in fp64
    Likelihood, Square, Dpo                  token log-probs of a batch to one of these losses
    check_*                                  what has no optimum or no mean is rejected

A loss sees a completion through l(y) = log pi(y | x), the sum of its tokens' log-probs under the
policy, and l0(y) = log pi_base(y | x), which is constant. The values of a tensor are checked on the
CPU only: on a GPU each look at them would wait for the device.

S scored tokens, N completions of all prompts of a batch, Q pairs of completions (y, y').
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sharpen.errors import InputError, check_value

from .groups import Batch, check_choice

Per = Literal["token", "sequence"]
# log-probs [S] of a batch under the policy, and the batch
Objective = Callable[[Tensor, Batch], Tensor]


def sequence_sums(
    logprob: Float[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float64[Tensor, " bounds-1"]:
    """Log-probability of each completion, in nats; differentiable.

        l[n] = sum_s logprob[s],    s in offsets[n] ... offsets[n + 1] - 1

    Example:
        >>> sequence_sums(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 3])).tolist()
        [-3.0, -4.0]
    """
    return torch.segment_reduce(logprob.double(), "sum", offsets=offsets.to(logprob.device))


def nll(
    logprob: Float[Tensor, " S"],
    offsets: Int64[Tensor, " bounds"],
    weight: Float64[Tensor, " bounds-1"],
    *,
    per: Per = "token",
) -> Float64[Tensor, ""]:
    """Weighted negative log-likelihood of completions, in nats.

        per="sequence":  -sum_n w[n] l(y_n) / sum_n w[n]
        per="token":     -sum_n w[n] l(y_n) / sum_n w[n] length[n]

    Within one batch the two differ by a factor only: every token of a completion weighs the same
    in both, and long completions are not played down.

    With w = 1 on the best of N it is SFT-Sharpening; with w = exp(r / lambda) / sum exp(r / lambda)
    over a prompt's samples it is power self-distillation.

    Args:
        logprob: Of each token under the policy.
        offsets: Completion n owns the tokens offsets[n] ... offsets[n + 1] - 1.
        weight: At least 0; one above it at least.
        per: What the mean is over.

    Raises:
        InputError: If there is no such `per`, or the weights are not as above.

    Source:
        Huang et al. 2024, arXiv:2412.01951, section 2.1; Tomihari and Sato 2026, arXiv:2605.04542.

    Example:
        >>> logprob, offsets = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 3])
        >>> weight = torch.tensor([1.0, 1.0], dtype=torch.float64)
        >>> nll(logprob, offsets, weight, per="sequence").item()
        3.5
        >>> round(nll(logprob, offsets, weight, per="token").item(), 4)
        2.3333
    """
    check_choice("per", per, Per)
    check_weights(weight, offsets)
    weight_N = weight.to(logprob.device)
    size_N = offsets.diff().to(weight_N) if per == "token" else torch.ones_like(weight_N)
    return -(weight_N * sequence_sums(logprob, offsets)).sum() / (weight_N * size_N).sum()


def square_loss(
    log_ratio: Float64[Tensor, " N"],
    reward: Float64[Tensor, " N"],
    pairs: Int64[Tensor, "Q 2"],
    *,
    beta: float,
) -> Float64[Tensor, ""]:
    """Mean squared error of implicit reward differences, in nats squared: RLHF-Sharpening.

        e[q] = beta ((l - l0)(y) - (l - l0)(y')) - (r(y) - r(y')),    loss = mean_q e[q]^2

    Zero where pi(y | x) is proportional to pi_base(y | x) exp(r(y | x) / beta), on every pair that
    can be drawn; for r = log pi_base that is pi_base^(1 + 1/beta).

    Args:
        log_ratio: l - l0 of each completion.
        reward: r of each completion.
        pairs: Indices (y, y') of completions of one prompt; at least one pair.
        beta: Weight of the KL term, above 0 and finite; small sharpens more.

    Raises:
        InputError: If `beta` or `pairs` is not as above, or the lengths differ.

    Source:
        Huang et al. 2024, arXiv:2412.01951, Eq. (8); one step of REBEL, arXiv:2404.16767.

    Example:
        >>> log_ratio = torch.tensor([0.5, -0.5], dtype=torch.float64)
        >>> reward = torch.tensor([-1.0, -4.0], dtype=torch.float64)
        >>> square_loss(log_ratio, reward, torch.tensor([[0, 1]]), beta=2.0).item()
        1.0
    """
    check_beta(beta)
    check_lengths(log_ratio=log_ratio, reward=reward)
    check_pairs(pairs, len(log_ratio))
    implicit_Q = beta * _differences(log_ratio, pairs)
    return (implicit_Q - _differences(reward.to(log_ratio), pairs)).square().mean()


def xpo_loss(
    logprob: Float64[Tensor, " N"],
    reference: Float64[Tensor, " N"],
    reward: Float64[Tensor, " N"],
    pairs: Int64[Tensor, "Q 2"],
    *,
    beta: float,
    optimism: float,
) -> Float64[Tensor, ""]:
    """`square_loss` plus optimism: XPO with explicit rewards.

        loss = mean_q e[q]^2 + optimism mean_q l(y'),    y' drawn from the base model

    Minimised, the second term lowers the log-prob of what the base model draws anyway, and so
    raises what it does not: exploration. Algorithm 1 prints "-" before the squares, which would
    maximise the error; its proof (appendix J.2) minimises

        sum beta l(y') + beta / (alpha (V + R)^2) sum e^2,

    which, multiplied by alpha (V + R)^2 / beta, is this loss with optimism = alpha (V + R)^2: see
    `xpo.optimism_weight`.

    Args:
        logprob: l of each completion.
        reference: l0 of each completion.
        reward: r of each completion.
        pairs: Indices (y, y'): y from the policy, y' from the base model, of one prompt.
        beta: As in `square_loss`.
        optimism: Weight of the second term, at least 0 and finite, in nats.

    Raises:
        InputError: If `optimism` is not as above, or as `square_loss` does.

    Source:
        Huang et al. 2024, arXiv:2412.01951, Algorithm 1 and appendix J.2.

    Example:
        >>> logprob = torch.tensor([-0.5, -4.5], dtype=torch.float64)
        >>> base = torch.tensor([-1.0, -4.0], dtype=torch.float64)
        >>> xpo_loss(logprob, base, base, torch.tensor([[0, 1]]), beta=2.0, optimism=0.1).item()
        0.55
    """
    check_optimism("optimism", optimism)
    check_lengths(logprob=logprob, reference=reference)
    error = square_loss(logprob - reference.to(logprob), reward, pairs, beta=beta)
    return error + optimism * logprob[pairs[:, 1].to(logprob.device)].mean()


def dpo_loss(
    log_ratio: Float64[Tensor, " N"], pairs: Int64[Tensor, "Q 2"], *, beta: float
) -> Float64[Tensor, ""]:
    """Mean logistic loss of preferring y to y', in nats: DPO, the common baseline.

        loss = -mean_q log sigma(beta ((l - l0)(y) - (l - l0)(y')))

    Knows which of a pair is better and not by how much: it has no finite optimum where one always
    is.

    Args:
        log_ratio: l - l0 of each completion.
        pairs: Indices (preferred, other) of completions of one prompt; at least one pair.
        beta: Above 0 and finite.

    Raises:
        InputError: If `beta` or `pairs` is not as above.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, Eq. (7).

    Example:
        >>> log_ratio = torch.tensor([0.0, 0.0], dtype=torch.float64)
        >>> round(dpo_loss(log_ratio, torch.tensor([[0, 1]]), beta=1.0).item(), 4)
        0.6931
    """
    check_beta(beta)
    check_pairs(pairs, len(log_ratio))
    return -torch.nn.functional.logsigmoid(beta * _differences(log_ratio, pairs)).mean()


@dataclass(frozen=True)
class Likelihood:
    """Fit the weighted completions: SFT-Sharpening, power self-distillation. See `nll`."""

    per: Per = "token"

    def __post_init__(self) -> None:
        """Reject an unknown mean."""
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
        """Reject what has no optimum."""
        check_beta(self.beta)
        check_optimism("optimism", self.optimism)

    def __call__(self, logprob: Float[Tensor, " S"], batch: Batch) -> Float64[Tensor, ""]:
        """The loss of a batch."""
        logprob_N = sequence_sums(logprob, batch.offsets)
        if self.optimism == 0:
            log_ratio_N = logprob_N - batch.reference.to(logprob_N)
            return square_loss(log_ratio_N, batch.reward, batch.pairs, beta=self.beta)
        return xpo_loss(
            logprob_N,
            batch.reference,
            batch.reward,
            batch.pairs,
            beta=self.beta,
            optimism=self.optimism,
        )


@dataclass(frozen=True)
class Dpo:
    """Prefer the first of each pair. See `dpo_loss`."""

    beta: float

    def __post_init__(self) -> None:
        """Reject what has no optimum."""
        check_beta(self.beta)

    def __call__(self, logprob: Float[Tensor, " S"], batch: Batch) -> Float64[Tensor, ""]:
        """The loss of a batch."""
        logprob_N = sequence_sums(logprob, batch.offsets)
        return dpo_loss(logprob_N - batch.reference.to(logprob_N), batch.pairs, beta=self.beta)


def check_beta(beta: float) -> None:
    """Reject a beta without an optimum."""
    if not 0 < beta < math.inf:
        raise InputError(f"`beta` must be above 0 and finite, got {beta}; try 1.")


def check_optimism(name: str, value: float) -> None:
    """Reject a negative, NaN or infinite weight of optimism, or factor of one."""
    check_value(name, value, 0 <= value < math.inf, "at least 0 and finite")


def check_rounds(rounds: int) -> None:
    """Reject a number of rounds that is not a positive integer."""
    holds = isinstance(rounds, Integral) and rounds >= 1
    check_value("rounds", rounds, holds, "a whole number of at least 1")


def check_lengths(**tensors: Tensor) -> None:
    """Reject tensors that do not hold one number for each of the same completions."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(shapes.values()))
    if len(first) != 1 or any(shape != first for shape in shapes.values()):
        got = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise InputError(
            f"{', '.join(f'`{x}`' for x in shapes)} must hold one number a completion, got {got}."
        )


def check_pairs(pairs: Tensor, n: int) -> None:
    """Reject what is not [Q, 2] indices into n completions; no pairs have no mean."""
    if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) == 0:
        raise InputError(
            f"`pairs` must be of shape [Q, 2] with Q at least 1, got {list(pairs.shape)}; "
            "leave out a batch that has none."
        )
    if pairs.device.type == "cpu":
        low, high = pairs.min().item(), pairs.max().item()
        if low < 0 or high >= n:
            raise InputError(
                f"`pairs` must hold indices in [0, {n}), got {low if low < 0 else high}."
            )


def check_weights(weight: Tensor, offsets: Tensor) -> None:
    """Reject weights that have no mean: not one a completion, not finite, negative, or all 0."""
    if weight.ndim != 1 or len(weight) != len(offsets) - 1:
        raise InputError(
            f"`weight` must hold one number for each of N={len(offsets) - 1} completions, got "
            f"shape {list(weight.shape)}."
        )
    if weight.device.type == "cpu":
        good = weight.isfinite() & (weight >= 0)
        if not bool(good.all()):
            got = weight[~good][0].item()
            raise InputError(f"`weight` must be finite and at least 0, got {got}; leave that out.")
        if not bool(torch.any(weight > 0)):
            raise InputError("`weight` must be above 0 somewhere, got 0 everywhere.")


def _differences(
    values: Float64[Tensor, " N"], pairs: Int64[Tensor, "Q 2"]
) -> Float64[Tensor, " Q"]:
    """The first of each pair less the second."""
    first_Q, second_Q = pairs.to(values.device).unbind(1)
    return values[first_Q] - values[second_Q]
