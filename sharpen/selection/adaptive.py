"""Adaptive best-of-N: stop a prompt's draws once its best is probably the best there is.

After k draws stop at the first k with

    log k + max_{j <= k} log pi(y_j | x) >= log mu,      mu = log(2 / delta)

No draw is more probable than y*, so the rule cannot stop before draw mu / pi(y*); and that many
draws all miss y* with probability (1 - pi(y*))^(mu / pi(y*)) <= exp(-mu) = delta / 2. Each prompt
takes about mu / pi(y*) draws of its own, where a fixed N must serve the hardest prompt. An output
of -50 nats needs e^50 draws: then the cap ends them, and nothing is certified.

N completions of all prompts together, P prompts, K draws of one prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from sharpen.errors import InputError, check_fields
from sharpen.scoring import Scores


class AdaptiveChoice(NamedTuple):
    """What the rule chose for each prompt, and what it needed.

    Attributes:
        chosen: Index of the most probable of the first `n_used` completions, the first of equals;
            -1 where none of them is eligible.
        n_used: Draws that the rule saw: where it stopped, or all there were up to the cap.
        certified: Whether it stopped. Only there does delta hold.
    """

    chosen: Int64[Tensor, " P"]
    n_used: Int64[Tensor, " P"]
    certified: Bool[Tensor, " P"]

    @property
    def certified_fraction(self) -> float:
        """Share of the prompts that stopped by the rule; NaN of no prompts."""
        return float(self.certified.double().mean())


@dataclass
class Stopping:
    """The rule on one prompt, draw by draw.

    Attributes:
        delta: Chance, at most, to stop without the most probable completion; in (0, 1).
        cap: Most draws; at least 1.
        n_used: Draws seen so far; none counts after the end.
        best: Log-prob in nats of the most probable eligible draw, -inf where there is none.
        chosen: Its index, -1 where there is none.
        is_certified: Whether the rule has stopped.

    Raises:
        InputError: If `delta` or `cap` is out of range.

    Source:
        Huang et al. 2024, arXiv:2412.01951, appendix D (with mu = log(2 / delta)) and lemma I.1.

    Example:
        >>> rule = Stopping(delta=0.5, cap=10)  # mu = log 4 = 1.386
        >>> rule.see([-1.5, -0.5, -0.1])  # 2 exp(-0.5) = 1.213, 3 exp(-0.1) = 2.715
        >>> rule.n_used, rule.chosen, rule.is_certified
        (3, 2, True)
    """

    delta: float
    cap: int
    n_used: int = 0
    best: float = -math.inf
    chosen: int = -1
    is_certified: bool = False

    def __post_init__(self) -> None:
        check_fields(
            self,
            [
                ("delta", 0 < self.delta < 1, "in (0, 1)"),
                ("cap", self.cap >= 1, "at least 1"),
                ("cap", isinstance(self.cap, Integral), "a whole number"),
            ],
        )

    @property
    def is_over(self) -> bool:
        """Whether no further draw counts."""
        return self.is_certified or self.n_used >= self.cap

    @property
    def n_wanted(self) -> int:
        """Draws that are still needed, at most, if none better than the best comes: to the cap."""
        if self.is_over:
            return 0
        log_needed = math.log(math.log(2 / self.delta)) - self.best
        if log_needed >= math.log(self.cap):
            return self.cap - self.n_used
        return min(self.cap, max(self.n_used + 1, math.ceil(math.exp(log_needed)))) - self.n_used

    def see(self, logprobs: Sequence[float | None]) -> None:
        """Take the next draws in order, up to where the rule ends.

        Args:
            logprobs: Of whole completions, nats; None for one that is not eligible. It counts as a
                draw, and is never the best.

        Raises:
            InputError: If one is NaN or infinity, which nothing could beat; none is taken then.
        """
        bad = [x for x in logprobs if x is not None and not x < math.inf]
        if bad:
            raise InputError(
                f"`logprobs` must be numbers below infinity, got {bad[0]}; give None for a draw "
                "that must not be chosen."
            )
        log_mu = math.log(math.log(2 / self.delta))
        for logprob in logprobs:
            if self.is_over:
                return
            if logprob is not None and (self.chosen < 0 or logprob > self.best):
                self.best, self.chosen = logprob, self.n_used
            self.n_used += 1
            self.is_certified = math.log(self.n_used) + self.best >= log_mu


def adaptive_best_of_n(
    scores: Scores, *, delta: float = 0.05, cap: int | None = None
) -> AdaptiveChoice:
    """The most probable completion of each prompt, among as many as the stopping rule asks for.

    Completions are taken in input order, as if they were drawn one by one; the rest is not looked
    at. `sharpen.sampling.adaptive` draws no more than that. The rule needs completions that were
    drawn from the model itself: at temperature 1, without top-p, and their exact log-probs.

    Args:
        scores: Scored completions of P prompts.
        delta: Chance, at most, that a certified choice is not the most probable completion.
        cap: Most completions per prompt; default: all there are.

    Raises:
        InputError: If `delta` or `cap` is out of range.

    Source:
        Huang et al. 2024, arXiv:2412.01951, appendix D.

    Example:
        >>> scores = Scores.from_logprobs([[[-0.5], [-1.0], [-0.1]], [[-9.0], [-8.0]]])
        >>> found = adaptive_best_of_n(scores, delta=0.5)
        >>> found.chosen, found.n_used, found.certified_fraction
        (tensor([2, 1]), tensor([3, 2]), 0.5)
    """
    sizes = scores.groups.diff().tolist()
    most = max(sizes, default=1) or 1 if cap is None else cap
    # what is wrong is wrong of no prompts, too
    Stopping(delta, most)
    rules = [Stopping(delta, most) for _ in sizes]
    for rule, logprobs in zip(rules, draws_in_order(scores), strict=True):
        rule.see(logprobs)
    return outcome_of(rules)


def draws_in_order(scores: Scores) -> list[list[float | None]]:
    """Log-prob of each completion of each prompt in nats, None where it is not eligible."""
    drawn = zip(scores.reward("logprob").tolist(), scores.eligible.tolist(), strict=True)
    logprobs = [logprob if is_eligible else None for logprob, is_eligible in drawn]
    return [logprobs[first:last] for first, last in pairwise(scores.groups.tolist())]


def outcome_of(rules: Sequence[Stopping]) -> AdaptiveChoice:
    """What the rules of P prompts have come to."""
    return AdaptiveChoice(
        torch.tensor([rule.chosen for rule in rules], dtype=torch.int64),
        torch.tensor([rule.n_used for rule in rules], dtype=torch.int64),
        torch.tensor([rule.is_certified for rule in rules], dtype=torch.bool),
    )
