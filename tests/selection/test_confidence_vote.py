import pytest
import torch

from sharpen import Scores
from sharpen.errors import InputError
from sharpen.selection import confidence_filter, confidence_vote
from sharpen_kernels import TokenStats


def scores_of(n):
    return Scores.from_logprobs([[[-1.0]] * n])


def kept(values, keep, answers=None):
    reward = torch.tensor(values)
    return confidence_filter(scores_of(len(values)), reward, keep=keep, answers=answers).tolist()


@pytest.mark.parametrize(
    ("n", "keep", "want"),
    [(10, 0.1, 1), (10, 0.11, 2), (10, 1.0, 10), (3, 0.1, 1), (100, 0.07, 7), (30, 0.9, 27)],
)
def test_the_share_is_rounded_up(n, keep, want):
    values = torch.randperm(n).float()
    mask = torch.tensor(kept(values.tolist(), keep))
    assert mask.sum() == want
    assert values[mask].min() > values[~mask].max() if want < n else True


def test_equals_of_the_last_one_kept_are_kept():
    assert kept([1.0, 3.0, 2.0, 2.0, 2.0], 0.4) == [False, True, True, True, True]


def test_completions_without_an_answer_are_not_counted():
    values, answers = [9.0, 8.0, 2.0, 1.0], [None, None, "a", "b"]
    assert kept(values, 0.5) == [True, True, False, False]
    assert kept(values, 0.5, answers) == [False, False, True, False]
    assert kept(values, 0.5, [None] * 4) == [False] * 4


def test_confidences_of_the_kept_are_summed():
    reward, answers = torch.tensor([5.0, 3.0, 3.0, 2.0]), ["a", "b", "b", "a"]

    def vote(keep):
        return confidence_vote(scores_of(4), answers, reward=reward, keep=keep).item()

    assert vote(0.25) == 0  # 5
    assert vote(0.75) == 1  # 5 against 3 + 3
    assert vote(1.0) == 0  # 7 against 6


def test_the_filter_of_a_vote_is_among_the_answers():
    reward = torch.tensor([9.0, 8.0, 1.0, 2.0])
    answers = [None, None, "b", "a"]
    assert confidence_vote(scores_of(4), answers, reward=reward, keep=0.5).item() == 3


def test_the_default_is_the_tail_confidence():
    topk_mean = torch.tensor([-1.0, -9.0, -9.0, -1.0, -2.0, -2.0])
    stats = TokenStats(logprob=-torch.ones(6), topk_mean=topk_mean)
    scores = Scores.of(stats, [[2, 2, 2]])
    assert confidence_vote(scores, ["a", "b", "b"], keep=1.0).tolist() == [0]
    assert confidence_filter(scores).tolist() == [True, False, False]


def test_negative_votes_and_bad_shares_are_refused():
    with pytest.raises(InputError, match=r"`reward` must be at least 0 to be summed.*got -1;"):
        confidence_vote(scores_of(2), ["a", "b"], reward="logprob")
    for keep in (0.0, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"`keep` must be in \(0, 1\], got"):
            confidence_filter(scores_of(2), "logprob", keep=keep)
