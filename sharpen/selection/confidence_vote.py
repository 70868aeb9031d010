"""DeepConf, offline: leave out the completions of low confidence, let the others vote by theirs.

N completions of all prompts together, P prompts.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen.scoring import Scores
from sharpen.scoring.votes import check_one_each

from .candidates import candidates
from .vote import weighted_vote


def confidence_filter(
    scores: Scores,
    reward: str | Float[Tensor, " N"] = "confidence_tail",
    *,
    keep: float = 0.1,
    answers: Sequence[str | None] | None = None,
) -> Bool[Tensor, " N"]:
    """Which completions are among the `keep` share of their prompt with the highest reward.

        kept[n] = n eligible, and reward[n] >= the ceil(keep G)-th highest of G eligible rewards

    So at least one is kept where one is eligible, and all that are equal to the last one kept.

    Args:
        scores: Scored completions of P prompts.
        reward: The name of a reward without options, or one reward per completion.
        keep: In (0, 1].
        answers: If given, completions without an answer are neither counted nor kept.

    Raises:
        InputError: If `keep` is out of range, the reward cannot be computed, or there is not one
            answer per completion.

    Source:
        Fu et al. 2025 (DeepConf), arXiv:2508.15260, confidence filtering.

    Example:
        >>> scores = Scores.from_logprobs([[[-1.0], [-2.0], [-3.0], [-4.0]]])
        >>> confidence_filter(scores, "logprob", keep=0.5)
        tensor([ True,  True, False, False])
    """
    if not 0 < keep <= 1:
        raise InputError(f"`keep` must be in (0, 1], got {keep}.")
    if answers is not None:
        check_one_each("answers", answers, len(scores.valid))
    kept_N = torch.zeros(len(scores.valid), dtype=torch.bool)
    for group in candidates(scores, reward):
        pairs = [
            (n, value)
            for n, value in zip(group.members, group.rewards, strict=True)
            if answers is None or answers[n] is not None
        ]
        if pairs:
            # 0.07 x 100 is 7.000000000000001
            n_kept = math.ceil(round(keep * len(pairs), 9))
            edge = sorted((value for _, value in pairs), reverse=True)[max(n_kept, 1) - 1]
            kept_N[[n for n, value in pairs if value >= edge]] = True
    return kept_N


def confidence_vote(
    scores: Scores,
    answers: Sequence[str | None],
    *,
    reward: str | Float[Tensor, " N"] = "confidence_tail",
    keep: float = 0.1,
) -> Int64[Tensor, " P"]:
    """Index of the completion that stands for the answer of largest summed confidence.

        V(a) = sum of reward[n] over the n kept by `confidence_filter` with answers[n] = a

    The filter is among the completions that have an answer. Ties, and prompts without an answer:
    as in `weighted_vote`.

    Args:
        scores: Scored completions of P prompts.
        answers: What each of the N completions answers, None where nothing could be read.
        reward: The confidence, at least 0: its sums are the votes. Also says which completion
            stands for the answer.
        keep: Share of each prompt's completions that vote, in (0, 1]; the source takes 0.1 and 0.9.

    Returns:
        An index into the completions of each prompt, -1 where none is eligible.

    Raises:
        InputError: If a vote would be negative, as a log-prob's, and as in `confidence_filter`.

    Source:
        Fu et al. 2025 (DeepConf), arXiv:2508.15260, confidence-weighted majority voting.

    Example:
        >>> scores = Scores.from_logprobs([[[-1.0], [-1.0], [-1.0]]])
        >>> confidence = torch.tensor([5.0, 2.0, 2.0])
        >>> confidence_vote(scores, ["7", "24", "24"], reward=confidence, keep=1.0)  # 5 against 4
        tensor([0])
    """
    kept = confidence_filter(scores, reward, keep=keep, answers=answers)
    reward_N = scores.reward(reward) if isinstance(reward, str) else reward.detach().cpu()
    weight_N = torch.where(kept, reward_N.double(), 0.0)
    if bool((weight_N < 0).any()):
        raise InputError(
            f"`reward` must be at least 0 to be summed as votes, got {weight_N.min().item():g}; "
            'take a confidence or "self_certainty", or `borda_vote`.'
        )
    return weighted_vote(scores, answers, weight_N, reward=reward)
