import math
import random

import pytest

from sharpen import Scores
from sharpen.errors import InputError
from sharpen.selection import adaptive_best_of_n
from sharpen.selection.adaptive import Stopping

INF = float("inf")
# laws of the outputs of prompts from easy to hard; the third has two most probable outputs
LAWS = [
    [0.9, 0.1],
    [0.5, 0.3, 0.2],
    [0.2, 0.2] + [0.1] * 6,
    [0.1] + [0.09] * 10,
    [0.03] + [0.97 / 50] * 50,
]


def by_definition(logprobs, delta, cap):
    """First k with log k + max log pi >= log mu, and the argmax of those k."""
    log_mu = math.log(math.log(2 / delta))
    for k in range(1, min(cap, len(logprobs)) + 1):
        if math.log(k) + max(logprobs[:k]) >= log_mu:
            return logprobs.index(max(logprobs[:k])), k, True
    k = min(cap, len(logprobs))
    return logprobs.index(max(logprobs[:k])), k, False


def exact(law, delta, cap=100_000):
    """Chance to stop without the most probable output, and the mean number of draws."""
    logs = [math.log(p) for p in law]
    miss = mean = 0.0
    state = {-INF: 1.0}  # chance of each best so far, of the runs that go on
    for k in range(cap):
        after = {}
        for best, chance in state.items():
            for logprob, p in zip(logs, law, strict=True):
                rule = Stopping(delta, cap, n_used=k, best=best, chosen=-1 if best == -INF else 0)
                rule.see([logprob])
                if not rule.is_over:
                    after[rule.best] = after.get(rule.best, 0.0) + chance * p
                    continue
                mean += chance * p * (k + 1)
                miss += chance * p * (rule.best < max(logs))
        state = {best: chance for best, chance in after.items() if chance > 1e-12}
        if not state:
            break
    return miss, mean


def test_hand_worked():
    # mu = log 40 = 3.689: 1 x 0.5, 2 x 0.6, ..., 6 x 0.6 = 3.6, 7 x 0.6 = 4.2
    logprobs = [math.log(x) for x in (0.5, 0.6, 0.1, 0.2, 0.5, 0.6, 0.4, 0.9)]
    found = adaptive_best_of_n(Scores.from_logprobs([[[x] for x in logprobs]]), delta=0.05)
    assert (found.chosen.item(), found.n_used.item(), found.certified.item()) == (1, 7, True)
    found = adaptive_best_of_n(Scores.from_logprobs([[[x] for x in logprobs[:6]]]), delta=0.05)
    assert (found.chosen.item(), found.n_used.item(), found.certified.item()) == (1, 6, False)
    assert found.certified_fraction == 0


@pytest.mark.parametrize("delta", [0.9, 0.3, 0.01])
@pytest.mark.parametrize("cap", [1, 5, 1000])
def test_every_prompt_is_judged_by_the_definition(delta, cap):
    rng = random.Random(0)
    logprobs = [[rng.uniform(-4, 0) for _ in range(rng.randint(1, 30))] for _ in range(60)]
    scores = Scores.from_logprobs([[[x] for x in group] for group in logprobs])
    found = adaptive_best_of_n(scores, delta=delta, cap=cap)
    # as the scores hold them, in fp32
    held = [x.tolist() for x in scores.by_prompt("logprob")]
    want = [by_definition(group, delta, cap) for group in held]
    assert list(zip(*(x.tolist() for x in found), strict=True)) == want
    assert found.certified_fraction == sum(stopped for *_, stopped in want) / 60


def test_draws_after_the_stop_are_not_looked_at():
    scores = Scores.from_logprobs([[[-0.2], [-0.3], [-0.01]]])
    found = adaptive_best_of_n(scores, delta=0.5)
    assert (found.chosen.item(), found.n_used.item()) == (0, 2)


def test_ineligible_draws_count_and_are_never_the_best():
    nan = float("nan")
    scores = Scores.from_logprobs(
        [[[-0.01], [], [nan], [-0.5]], [[-0.01], [-0.5], [-0.5], [-0.5]]],
        valid=[[False, True, True, True], [False, True, True, True]],
    )
    found = adaptive_best_of_n(scores, delta=0.5)  # mu = 1.386: 4 x 0.607 and 3 x 0.607
    assert found.chosen.tolist() == [3, 1]
    assert found.n_used.tolist() == [4, 3]
    assert found.certified.all()


@pytest.mark.parametrize("delta", [0.9, 0.5, 0.2, 0.05, 0.01])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"p{law[0]}")
def test_miss_rate_and_cost_keep_to_the_lemma(law, delta):
    mu, top = math.log(2 / delta), max(law)
    miss, mean = exact(law, delta)
    assert miss <= delta / 2
    assert mu / top <= math.ceil(mu / top) <= mean + 1e-9
    assert mean <= (mu + 1 / law.count(top)) / top


@pytest.mark.parametrize("delta", [0.2, 0.05, 0.01])
def test_fewer_draws_than_the_fixed_number_of_the_same_guarantee(delta):
    # a fixed N does not know which prompt is hard: it is what the hardest needs
    fixed = math.ceil(math.log(1 / delta) / min(max(law) for law in LAWS))
    adaptive = sum(exact(law, delta)[1] for law in LAWS) / len(LAWS)
    assert adaptive < fixed / 2


def test_draws_still_wanted_are_those_after_which_the_rule_stops():
    for best in (-0.01, -0.4, -1.0, -3.3):
        rule = Stopping(0.05, cap=1000)
        rule.see([best])
        wanted = rule.n_wanted
        rule.see([-50.0] * (wanted - 1))
        assert not rule.is_over
        rule.see([-50.0])
        assert rule.is_certified
        assert rule.n_wanted == 0
    capped = Stopping(0.05, cap=9)
    assert capped.n_wanted == 9
    capped.see([-800.0, None])
    assert capped.n_wanted == 7
    capped.see([None] * 20)
    assert (capped.n_used, capped.is_over, capped.is_certified) == (9, True, False)


def test_bad_settings_are_refused():
    scores = Scores.from_logprobs([[[-1.0]]])
    for delta in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(InputError, match=r"`delta` must be in \(0, 1\), got"):
            adaptive_best_of_n(scores, delta=delta)
    with pytest.raises(InputError, match=r"`cap` must be at least 1, got 0"):
        adaptive_best_of_n(scores, delta=0.1, cap=0)


def test_bad_settings_are_refused_of_no_prompts_too():
    nothing = Scores.from_logprobs([])
    assert adaptive_best_of_n(nothing).chosen.tolist() == []
    with pytest.raises(InputError, match=r"`delta` must be in \(0, 1\), got 5"):
        adaptive_best_of_n(nothing, delta=5.0)
    with pytest.raises(InputError, match="`cap` must be at least 1, got -1"):
        adaptive_best_of_n(nothing, cap=-1)


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_a_draw_that_nothing_could_beat_is_refused_and_not_taken(bad):
    rule = Stopping(0.5, cap=10)
    with pytest.raises(InputError, match=f"`logprobs` must be numbers below infinity, got {bad}"):
        rule.see([-3.0, bad])
    assert (rule.n_used, rule.best, rule.chosen) == (0, -INF, -1)
    # and goes on as if it had not been there
    rule.see([-1.5, None, -0.5, -0.1])
    assert (rule.n_used, rule.chosen, rule.is_certified) == (3, 2, True)


def test_a_broken_number_of_draws_is_refused():
    # the types that tests run under would refuse it before
    rule = Stopping(0.5, cap=3)
    rule.cap = 2.5
    with pytest.raises(InputError, match=r"`cap` must be a whole number, got 2\.5"):
        rule.__post_init__()
