import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny import tiny
from sharpen.scoring import Scorer
from sharpen.server.batcher import Job, choose, split

IDS = st.lists(st.integers(0, 3), min_size=1, max_size=4)
# made into jobs in the test: the checks of types draw random numbers, which a strategy must not
JOBS = st.lists(st.tuples(IDS, st.lists(IDS, min_size=0, max_size=3)), max_size=8)


@given(JOBS, st.integers(1, 30))
def test_a_batch_has_the_oldest_job_and_keeps_to_its_tokens(pairs, max_tokens):
    jobs = [Job(*pair) for pair in pairs]
    chosen = choose(jobs, max_tokens)
    assert len(set(chosen)) == len(chosen)
    assert chosen[:1] == [0][: len(jobs)]
    # what is read when everything that begins alike is read once
    if len(chosen) > 1:
        read = {
            (*jobs[i].prompt, *c[: n + 1])
            for i in chosen
            for c in jobs[i].completions
            for n in range(len(c))
        }
        prompts = {tuple(jobs[i].prompt) for i in chosen}
        assert sum(map(len, prompts)) + len(read) <= max_tokens


def test_jobs_of_the_oldest_prompt_come_before_older_jobs_of_another():
    jobs = [Job([1], [[2]]), Job([5], [[6]]), Job([1], [[3]])]
    assert choose(jobs, 3) == [0, 2]
    assert choose(jobs, 2) == [0]


def test_texts_that_begin_alike_count_their_opening_once():
    jobs = [Job([1], [[2] * 10 + [3]]), Job([1], [[2] * 10 + [4]]), Job([1], [[2] * 10])]
    assert choose(jobs, 1 + 11 + 1) == [0, 1, 2]
    assert choose(jobs, 1 + 11) == [0]


def test_a_small_job_does_not_overtake_one_that_must_wait():
    jobs = [Job([1], [[2]]), Job([5], [[6] * 9]), Job([7], [[8]])]
    assert choose(jobs, 5) == [0]


def test_parts_are_the_bits_of_one_call_over_all():
    scorer = Scorer(tiny())
    jobs = [Job([5, 6, 7], [[8, 9], [10]]), Job([3], [[], [4]]), Job([5, 6, 7], [[11, 12, 13]])]
    stats = ("logprob", "entropy", "topk_id")
    prompts, completions = [job.prompt for job in jobs], [job.completions for job in jobs]
    first, second, third = split(scorer.score(prompts, completions, stats=stats), jobs)
    whole = scorer.score([[5, 6, 7], [3]], [[[8, 9], [10], [11, 12, 13]], [[], [4]]], stats=stats)
    for name in stats:
        column = getattr(whole.tokens, name)
        assert torch.equal(getattr(first, name), column[:3])
        assert torch.equal(getattr(third, name), column[3:6])
        assert torch.equal(getattr(second, name), column[6:])
    assert first.lse is None
