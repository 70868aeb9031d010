from hypothesis import given
from hypothesis import strategies as st

from sharpen.sampling.base import Share, plan_batches


@given(
    lengths=st.lists(st.integers(1, 30), max_size=20),
    n=st.integers(1, 12),
    new=st.integers(1, 20),
    budget=st.integers(1, 400),
)
def test_every_sample_once_one_length_a_batch_within_budget(lengths, n, new, budget):
    batches = plan_batches(lengths, n, new, budget)
    seen = [(s.prompt, i) for batch in batches for s in batch for i in range(s.start, s.stop)]
    assert sorted(seen) == [(p, i) for p in range(len(lengths)) for i in range(n)]
    for batch in batches:
        (length,) = {lengths[share.prompt] for share in batch}
        rows = sum(share.stop - share.start for share in batch)
        assert rows == 1 or rows * (length + new) <= budget
        # whole prompts, or a part of one
        assert len(batch) == 1 or all((s.start, s.stop) == (0, n) for s in batch)


def test_a_prompt_that_does_not_fit_is_cut_into_near_equal_parts():
    assert plan_batches([10], n=10, max_new_tokens=10, max_tokens=80) == [
        [Share(0, 0, 3)],
        [Share(0, 3, 6)],
        [Share(0, 6, 10)],
    ]


def test_prompts_of_one_length_share_a_batch():
    batches = plan_batches([3, 5, 3, 3], n=2, max_new_tokens=1, max_tokens=16)
    assert [[share.prompt for share in batch] for batch in batches] == [[0, 2], [3], [1]]
