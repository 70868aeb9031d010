"""A prompt given with each of its completions is shared, and checked, as one given once."""

from collections.abc import Sequence

import pytest
import torch

from helpers.families import V, family
from sharpen import Scorer
from sharpen.errors import InputError
from sharpen.models import ModelLimits
from sharpen.scoring.pairs import pair_up


def ids(n, seed):
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [ids(30, 0), ids(21, 1)]
COMPLETIONS = [[ids(n, 10 + n) for n in (9, 1, 4)], [ids(n, 20 + n) for n in (6, 3)]]
# the completions of a prompt do not stand side by side
ORDER = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]


def tokens_read(scorer, prompts, completions):
    """Tokens of all forwards of a call, and its scores."""
    assert scorer.route
    seen = []
    handle = scorer.model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _out: seen.append(args[0].numel())
    )
    scores = scorer.score(prompts, completions)
    handle.remove()
    return sum(seen), scores.tokens.logprob.split(scores.offsets.diff().tolist())


@pytest.mark.parametrize("copies", [False, True], ids=["one object", "equal lists"])
@pytest.mark.parametrize(("name", "way"), [("llama", "tree"), ("lfm2", "cache")])
def test_rows_as_they_come_share_as_groups_do(name, way, copies):
    scorer = Scorer(family(name))
    assert scorer.route.sharing == way
    grouped, want = tokens_read(scorer, PROMPTS, COMPLETIONS)
    rows = [list(PROMPTS[p]) if copies else PROMPTS[p] for p, _ in ORDER]
    read, got = tokens_read(scorer, rows, [[COMPLETIONS[p][g]] for p, g in ORDER])
    assert read == grouped < sum(len(PROMPTS[p]) + len(COMPLETIONS[p][g]) - 1 for p, g in ORDER)
    starts = [0, len(COMPLETIONS[0])]
    for (p, g), logprob in zip(ORDER, got, strict=True):
        # packed or batched in the same rows: to the bit
        assert torch.equal(logprob, want[starts[p] + g])


class Counted(list):
    """A list that counts how often it is read."""

    reads = 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


def test_a_prompt_is_checked_and_copied_once_whatever_its_completions():
    limits = ModelLimits(vocab_size=V, max_length=None)
    once, grouped, apart = Counted(PROMPTS[0]), Counted(PROMPTS[0]), Counted(PROMPTS[0])
    pair_up(limits, [once], [[]])
    pair_up(limits, [grouped], [[[1], [2], [3]]])
    pairs = pair_up(limits, [apart] * 3, [[[1]], [[2]], [[3]]])
    assert once.reads == grouped.reads == apart.reads > 0
    assert pairs == [(PROMPTS[0], [n]) for n in (1, 2, 3)]


def test_a_bad_prompt_is_named_where_it_first_stands():
    limits = ModelLimits(vocab_size=V, max_length=None)
    good, bad = [1, 2], [1, V]
    with pytest.raises(InputError, match=rf"prompts\[1\]: token ids must be in .*, got {V} at"):
        pair_up(limits, [good, bad, bad], [[[1]]] * 3)
    # equal to a good one, and yet no ids
    with pytest.raises(InputError, match=r"prompts\[1\]: token ids must be integers, got True"):
        pair_up(limits, [good, [True, 2]], [[[1]]] * 2)


def test_prompts_that_are_made_while_they_are_read_are_not_taken_for_each_other():
    class Made(Sequence):
        """Each prompt is a new object, gone after its turn."""

        def __len__(self):
            return len(PROMPTS)

        def __getitem__(self, index):
            return list(PROMPTS[index])

    limits = ModelLimits(vocab_size=V, max_length=None)
    pairs = pair_up(limits, Made(), [[[1]], [[2]]])
    assert [prompt for prompt, _ in pairs] == PROMPTS
