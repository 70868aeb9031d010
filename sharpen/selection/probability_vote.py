"""The most probable answer, by the exact probabilities of the distinct completions that give it.

N completions of all prompts together, P prompts.
"""

import math
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sharpen.scoring import Scores
from sharpen.scoring.votes import check_one_each

from .candidates import candidates
from .vote import weighted_vote


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
    Ties, and prompts without an answer: as in `weighted_vote`.

    Args:
        scores: Scored completions of P prompts.
        answers: What each of the N completions answers, None where nothing could be read.
        keys: Equal for equal completions of a prompt: tuples of their token ids.
        reward: Says which completion stands for the answer.

    Returns:
        An index into the completions of each prompt, -1 where none is eligible.

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
        seen = set()
        for n, logprob in voters:
            if (answers[n], keys[n]) not in seen and logprob > -math.inf:
                weight_N[n] = math.exp(logprob - top)
            seen.add((answers[n], keys[n]))
    return weighted_vote(scores, answers, weight_N, reward=reward)
