"""Votes for answers: which completion stands for the answer that the completions of a prompt give.

Each eligible completion that has an answer votes for it; the rules differ in its weight, and all
of them end in `weighted_vote`.

N completions of all prompts together, P prompts, G eligible completions of one prompt.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import groupby

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from sharpen.errors import InputError, check_value
from sharpen.scoring import Scores
from sharpen.scoring.rewards import check_one_each, distinct_answers

from .best_of_n import candidates


def majority_vote(
    scores: Scores,
    answers: Sequence[str | None],
    *,
    reward: str | Float[Tensor, " N"] = "logprob",
) -> Int64[Tensor, " P"]:
    """Index of the completion that stands for the answer most completions give.

        V(a) = #{n eligible: answers[n] = a}
        chosen[p] = argmax of reward over the eligible completions of the answer of largest V

    Arguments, what is returned, who votes, ties, and prompts without an answer: as in
    `weighted_vote`.

    Raises:
        InputError: If the reward cannot be computed, or there is not one answer per completion.

    Source:
        Wang et al. 2022 (self-consistency), arXiv:2203.11171.

    Example:
        >>> scores = Scores.from_logprobs([[[-1.0], [-5.0], [-4.0]]])
        >>> majority_vote(scores, ["7", "24", "24"])
        tensor([2])
    """
    ones_N = torch.ones(len(scores.valid), dtype=torch.float64)
    return weighted_vote(scores, answers, ones_N, reward=reward)


def weighted_vote(
    scores: Scores,
    answers: Sequence[str | None],
    weight: Float64[Tensor, " N"],
    *,
    reward: str | Float[Tensor, " N"] = "logprob",
) -> Int64[Tensor, " P"]:
    """Index of the completion that stands for the answer of largest summed weight.

        V(a) = sum of weight[n] over the eligible n with answers[n] = a
        chosen[p] = argmax of reward over the eligible completions of the answer of largest V

    A completion votes if it is eligible as in `best_of_n`, has an answer, and its weight is not
    NaN. Of answers with equal V the one given first wins, of completions of equal reward the first.
    Where no completion votes, the one of highest reward is chosen. Weights are summed without
    rounding in between, so the order of the completions decides nothing but ties.

    Args:
        scores: Scored completions of P prompts.
        answers: What each of the N completions answers, None where nothing could be read.
        weight: Of each completion, at least 0; of any scale.
        reward: Says which completion stands for the answer.

    Returns:
        An index into the completions of each prompt, -1 where none is eligible.

    Raises:
        InputError: If the reward cannot be computed, there is not one answer and one weight per
            completion, or a weight is negative or infinite.

    Example:
        >>> scores = Scores.from_logprobs([[[-1.0], [-5.0], [-4.0]]])
        >>> weight = torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64)
        >>> weighted_vote(scores, ["7", "24", "24"], weight)
        tensor([0])
    """
    N = len(scores.valid)
    check_one_each("answers", answers, N)
    if weight.shape != (N,) or bool((weight.isinf() | (weight < 0)).any()):
        raise InputError(
            f"`weight` must hold a finite number of at least 0 for each of N={N} completions, "
            f"got {weight.tolist()[:8]}."
        )
    weights = weight.tolist()
    chosen = []
    for group in candidates(scores, reward):
        votes: dict[str, list[float]] = defaultdict(list)
        for n in group.members:
            answer = answers[n]
            if answer is not None and not math.isnan(weights[n]):
                votes[answer].append(weights[n])
        # max() keeps the first of equals
        winner = max(votes, key=lambda a: math.fsum(votes[a]), default=None)
        given = {n for n in group.members if answers[n] == winner}
        chosen.append(group.best(given if votes else None))
    return torch.tensor(chosen, dtype=torch.int64)


def borda_vote(
    scores: Scores,
    answers: Sequence[str | None],
    *,
    reward: str | Float[Tensor, " N"] = "self_certainty",
    p: float = 1.2,
) -> Int64[Tensor, " P"]:
    """Index of the completion that stands for the answer of most votes, weighted by rank.

        V(a) = sum over eligible n with answers[n] = a of (G - rank[n] + 1)^p

    rank 1 is the highest reward of the prompt's G eligible completions; those without an answer
    rank last and do not vote. Completions of equal reward share their votes evenly. p = 0 is the
    majority vote; as p grows the vote becomes best-of-N. Only the order of the rewards counts, not
    their scale. What is returned, ties, and prompts without an answer: as in `weighted_vote`.

    Args:
        scores: As in `weighted_vote`.
        answers: As in `weighted_vote`.
        reward: Ranks the completions, and says which one stands for the answer.
        p: At least 0 and finite. The source takes 0.3 for up to 16 completions, 1.2 from 32 on.

    Raises:
        InputError: If `p` is out of range, the reward cannot be computed, or there is not one
            answer per completion.

    Source:
        Kang, Zhao and Song 2025, arXiv:2502.18581.

    Example:
        >>> scores = Scores.from_logprobs([[[-1.0], [-2.0], [-3.0], [-4.0]]])
        >>> answers = ["7", "7", "24", "24"]
        >>> borda_vote(scores, answers, reward="logprob", p=1.0)  # 4 + 3 against 2 + 1
        tensor([0])
    """
    check_value("p", p, 0 <= p < math.inf, "at least 0 and finite")
    check_one_each("answers", answers, len(scores.valid))
    weight_N = torch.zeros(len(scores.valid), dtype=torch.float64)
    for group in candidates(scores, reward):
        reward_of = dict(zip(group.members, group.rewards, strict=True))
        voters = [n for n in group.members if answers[n] is not None]
        ranked = sorted(voters, key=reward_of.__getitem__, reverse=True)
        left = G = len(group.members)
        for _, tied in groupby(ranked, key=reward_of.__getitem__):
            members = list(tied)
            # of the largest: powers of whole numbers would overflow
            votes = [((left - i) / G) ** p for i in range(len(members))]
            weight_N[members] = math.fsum(votes) / len(votes)
            left -= len(members)
    return weighted_vote(scores, answers, weight_N, reward=reward)


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
    check_value("keep", keep, 0 < keep <= 1, "in (0, 1]")
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

    The filter is among the completions that have an answer. What is returned, ties, and prompts
    without an answer: as in `weighted_vote`.

    Args:
        scores: As in `weighted_vote`.
        answers: As in `weighted_vote`.
        reward: The confidence, at least 0: its sums are the votes. Also says which completion
            stands for the answer.
        keep: Share of each prompt's completions that vote, in (0, 1]; the source takes 0.1 and 0.9.

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


def probability_vote(
    scores: Scores,
    answers: Sequence[str | None],
    keys: Sequence[Hashable],
    *,
    reward: str | Float[Tensor, " N"] = "logprob",
) -> Int64[Tensor, " P"]:
    """Index of the completion that stands for the answer of largest sampled probability.

        P(a) = sum over the distinct eligible completions y with answer a of p(y | prompt)

    A majority vote estimates P(answer) by how often it was drawn; this adds up what the model
    itself says of each completion drawn, once. Its answer is that of best-of-N by the reward "rpc".
    What is returned, ties, and prompts without an answer: as in `weighted_vote`.

    Args:
        scores: As in `weighted_vote`.
        answers: As in `weighted_vote`.
        keys: Equal for equal completions of a prompt: tuples of their token ids.
        reward: As in `weighted_vote`.

    Raises:
        InputError: If a reward cannot be computed, or there is not one answer and one key per
            completion.

    Source:
        Zhou et al. 2025 (RPC), arXiv:2502.00511, perplexity consistency without pruning.

    Example:
        >>> scores = Scores.from_logprobs([[[-2.0], [-2.0], [-1.5]]])
        >>> probability_vote(scores, ["7", "7", "24"], keys=[(5,), (5,), (6,)])
        tensor([2])
    """
    check_one_each("answers", answers, len(scores.valid))
    check_one_each("keys", keys, len(scores.valid))
    weight_N = torch.zeros(len(scores.valid), dtype=torch.float64)
    for group in candidates(scores, scores.reward("logprob").double()):
        pairs = zip(group.members, group.rewards, strict=True)
        voters = [(n, logprob) for n, logprob in pairs if answers[n] is not None]
        # of the largest that votes: the probability of a long completion underflows
        top = max((logprob for _, logprob in voters), default=0.0)
        once = set(distinct_answers([n for n, _ in voters], answers, keys))
        for n, logprob in voters:
            if n in once and logprob > -math.inf:
                weight_N[n] = math.exp(logprob - top)
    return weighted_vote(scores, answers, weight_N, reward=reward)
