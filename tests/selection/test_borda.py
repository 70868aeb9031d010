import random

import pytest
import torch

from sharpen import Scores, best_of_n
from sharpen.errors import InputError
from sharpen.selection import borda_vote, majority_vote


def scores_of(rewards):
    """Scores whose summed log-probs are the rewards, minus 10."""
    return Scores.from_logprobs([[[x - 10.0] for x in rewards]])


def votes(rewards, answers, p):
    """The formula of the source, one completion at a time, for rewards without ties."""
    G, total = len(rewards), {}
    ranked = sorted(range(G), key=lambda n: (answers[n] is not None, rewards[n]), reverse=True)
    for rank, n in enumerate(ranked, start=1):
        if answers[n] is not None:
            total[answers[n]] = total.get(answers[n], 0) + (G - rank + 1) ** p
    return total


def test_hand_worked():
    # ranks 1 to 5 give 5, 4, 3, 2, 1 votes: a 5 + 1, b 4 + 3, and c 2
    rewards, answers = [9.0, 8.0, 7.0, 6.0, 5.0], ["a", "b", "b", "c", "a"]
    assert borda_vote(scores_of(rewards), answers, reward="logprob", p=1.0).tolist() == [1]
    # squared: a 25 + 1, b 16 + 9; cubed: a 126, b 91
    assert borda_vote(scores_of(rewards), answers, reward="logprob", p=2.0).tolist() == [0]
    assert borda_vote(scores_of(rewards), answers, reward="logprob", p=3.0).tolist() == [0]


def test_completions_without_an_answer_rank_last():
    # the one without an answer is fourth: 4 for a, 3 + 2 for b; were it first or left out, 3 for
    # a and 2 + 1 for b
    scores = scores_of([8.0, 9.0, 7.0, 6.0])
    answers = ["a", None, "b", "b"]
    assert borda_vote(scores, answers, reward="logprob", p=1.0).tolist() == [2]


def test_equal_rewards_share_their_votes():
    # places 1 to 3 share 3 + 2 + 1: two of them for each
    for answers in (["a", "b", "b"], ["b", "a", "b"], ["b", "b", "a"]):
        chosen = borda_vote(scores_of([5.0] * 3), answers, reward="logprob", p=1.0).item()
        assert answers[chosen] == "b"
    # places 2 and 3 share 2 + 1: as much as place 1, whose answer came first
    assert (
        borda_vote(scores_of([6.0, 5.0, 5.0]), ["b", "a", "a"], reward="logprob", p=1.0).item() == 0
    )
    # squared: the first two share 9 + 4, so b has 6.5 and a 6.5 + 1; unshared 9 against 4 + 1
    scores = scores_of([5.0, 5.0, 4.0])
    assert borda_vote(scores, ["b", "a", "a"], reward="logprob", p=2.0).tolist() == [1]


@pytest.mark.parametrize("p", [0.3, 1.0, 1.2, 5.0])
def test_the_answer_is_that_of_the_formula(p):
    rng = random.Random(0)
    for _ in range(60):
        rewards = [float(x) for x in rng.sample(range(50), 7)]
        answers = [rng.choice(["a", "b", "c", None]) for _ in rewards]
        want = votes(rewards, answers, p)
        chosen = borda_vote(scores_of(rewards), answers, reward="logprob", p=p).item()
        if want:
            assert want[answers[chosen]] == pytest.approx(max(want.values()))


def test_the_ends_are_majority_and_best_of_n():
    logprobs = (-9 * torch.rand(30, 8, 1)).tolist()
    scores = Scores.from_logprobs(logprobs)
    answers = [random.Random(n).choice("abc") for n in range(240)]
    vote = {p: borda_vote(scores, answers, reward="logprob", p=p).tolist() for p in (0.0, 1e3)}
    assert vote[0.0] == majority_vote(scores, answers).tolist()
    assert vote[1e3] == best_of_n(scores).tolist()


def test_only_the_order_of_the_rewards_counts():
    reward_N = torch.rand(240)
    scores = Scores.from_logprobs((-torch.rand(30, 8, 1)).tolist())
    answers = [random.Random(n).choice("abc") for n in range(240)]
    assert torch.equal(
        borda_vote(scores, answers, reward=reward_N),
        borda_vote(scores, answers, reward=reward_N.exp() * 100 - 900),
    )


@pytest.mark.parametrize("p", [-0.1, float("inf"), float("nan")])
def test_exponents_out_of_range_are_refused(p):
    with pytest.raises(InputError, match=r"`p` must be at least 0 and finite, got"):
        borda_vote(scores_of([1.0]), ["a"], reward="logprob", p=p)
