"""Tokens that completions share: their number, and their weight in a loss."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.families import family
from helpers.tiny import V, alone
from sharpen import Scorer
from sharpen.errors import InputError
from sharpen.scoring.packing import plan
from sharpen.scoring.pairs import sharers

IDS = st.integers(0, 1)
PROMPT = st.lists(IDS, min_size=1, max_size=4)
GROUPS = st.lists(st.tuples(PROMPT, st.lists(st.lists(IDS, max_size=5), max_size=4)), max_size=4)


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(GROUPS)
def test_tokens_of_one_past_are_counted(groups):
    tokens = [
        (tuple(prompt + completion[:s]), completion[s])
        for prompt, group in groups
        for completion in group
        for s in range(len(completion))
    ]
    number = Counter(tokens)
    got = sharers([prompt for prompt, _ in groups], [group for _, group in groups])
    assert got.tolist() == [number[token] for token in tokens]


def ids(n, seed):
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


OPENING = ids(12, 1)
PROMPTS = [ids(25, 0), ids(18, 9)]
# openings of 12 and of 16 tokens, a duplicate, one that begins another, one of a single token
COMPLETIONS = [
    [OPENING + ids(5, 2), OPENING + ids(4, 3) + [7, 8], OPENING + ids(4, 3) + [9], OPENING],
    [ids(6, 4), ids(6, 4), ids(6, 4)[:2], [5]],
]


def loss_of(slope):
    return lambda logprob: (slope * logprob.exp()).sum() + logprob[slope > 0].sum()


def gradient(model, loss, run):
    model.zero_grad()
    loss(run(PROMPTS, COMPLETIONS)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "lfm2"])
@pytest.mark.parametrize("once", [False, True])
def test_shared_openings_and_duplicates_weigh_as_in_separate_sequences(name, once):
    """By tree, cache and bounded memory; each entry of the log-probs has a slope of its own."""
    model = family(name)
    scorer = Scorer(model)
    pairs = [(p, c) for p, g in zip(PROMPTS, COMPLETIONS, strict=True) for c in g]
    assert plan(pairs, 2**14).packed < sum({len(p) for p, _ in pairs}) + sum(
        len(c) - 1 for _, c in pairs
    )
    count = sharers(PROMPTS, COMPLETIONS)
    assert set(count.tolist()) == {1, 2, 3, 4}
    slope = torch.linspace(-1, 2, len(count)) / (count if once else 1)
    loss = loss_of(slope)
    want = gradient(model, loss, lambda *given: alone(model, *given))
    got = gradient(model, loss, scorer.logprobs)
    assert (got - want).norm() <= 1e-5 * want.norm()
    model.zero_grad()
    scorer.backward(PROMPTS, COMPLETIONS, loss)
    bounded = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (bounded - want).norm() <= 1e-5 * want.norm()


def test_each_distinct_token_once_is_a_sum_over_the_tree():
    logprob = Scorer(family("llama")).score(PROMPTS, COMPLETIONS).tokens.logprob
    seen, place = {}, 0
    for prompt, group in zip(PROMPTS, COMPLETIONS, strict=True):
        for completion in group:
            for s, token in enumerate(completion):
                seen[(*prompt, *completion[:s], token)] = logprob[place]
                place += 1
    want = torch.stack(list(seen.values())).sum()
    got = (logprob / sharers(PROMPTS, COMPLETIONS)).sum()
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


def test_one_list_a_prompt():
    with pytest.raises(InputError, match=r"one list for each of 2 prompts, got 1"):
        sharers([[1], [2]], [[]])
    assert sharers([], []).shape == (0,)
