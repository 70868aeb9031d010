""""""

import math

import pytest
import torch

from helpers.enumerated import EOS, law, ranked, small
from sharpen.errors import InputError
from sharpen.experiments.theory import search as search_module
from sharpen.experiments.theory.coverage import mass_within
from sharpen.experiments.theory.search import SearchConfig, Tree, find_mode
from sharpen.models import load_tokenizer
from sharpen.records import PromptRecord
from sharpen.sampling import SamplingConfig
from sharpen.sampling.base import render_all
from sharpen.sampling.hf import TransformersSampler
from sharpen.scoring import Scorer

PROMPT = [1, 3, 4]
DEPTH = 4


def near(x):
    return pytest.approx(x, abs=2e-6)


def search(model, *, prompt=PROMPT, eos_ids=(EOS,), **options):
    config = SearchConfig(**{"max_new_tokens": DEPTH, **options})
    return find_mode(Scorer(model, sharing="none"), prompt, eos_ids, config)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("batch", [1, 7])
def test_it_finds_and_proves_the_best_two_of_all_completions(seed, batch):
    model = small(seed)
    finished, cut = law(model, PROMPT, DEPTH)
    mode = search(model, batch=batch)
    want = ranked(finished)
    assert mode.proved
    assert mode.complete
    assert mode.sequences[:2] == [ids for ids, _ in want[:2]]
    assert mode.logprobs[:2] == near([x for _, x in want[:2]])
    assert mode.runner_up == mode.logprobs[1]
    outside = [x for ids, x in finished.items() if ids not in mode.sequences]
    assert mode.bound >= max(outside) - 1e-6
    assert mode.finished_mass <= sum(map(math.exp, finished.values())) + 1e-9
    assert mode.cut_mass <= sum(map(math.exp, cut.values())) + 1e-9
    # each prefix that may not be expanded twice
    assert mode.n_expanded <= 1 + 4 + 16 + 64


@pytest.mark.parametrize("seed", [0, 3])
def test_it_lists_every_completion_above_a_level(seed):
    model = small(seed)
    finished, _ = law(model, PROMPT, DEPTH)
    level = ranked(finished)[40][1] - 1e-3
    mode = search(model, above=level)
    want = [(ids, x) for ids, x in ranked(finished) if x >= level]
    assert mode.complete
    assert mode.sequences == [ids for ids, _ in want]
    assert mode.logprobs == near([x for _, x in want])


def test_it_lists_every_completion_within_gamma_of_the_best():
    model = small(3)
    finished, _ = law(model, PROMPT, DEPTH)
    best = ranked(finished)[0][1]
    mode = search(model, gamma=0.95)
    want = [math.exp(x) for x in finished.values() if x >= best + math.log(0.05)]
    assert len(want) > 3
    assert mass_within(mode.logprobs, 0.95) == near(math.fsum(want))
    assert mass_within(mode.logprobs) == near(math.exp(best))


def test_with_nothing_pruned_all_mass_is_met():
    model = small(2)
    finished, cut = law(model, PROMPT, DEPTH)
    mode = search(model, above=-60.0)
    assert sorted(mode.sequences) == sorted(finished)
    assert mode.finished_mass == near(math.fsum(map(math.exp, finished.values())))
    assert mode.cut_mass == near(math.fsum(map(math.exp, cut.values())))
    assert mode.finished_mass + mode.cut_mass == near(1.0)
    assert mode.cut_bound == near(max(cut.values()))


@pytest.mark.parametrize("seed", [6, 9])
def test_a_tiny_budget_is_not_a_proof_and_its_bound_holds(seed):
    model = small(seed)
    finished, _ = law(model, PROMPT, DEPTH)
    (best, _), *_ = ranked(finished)
    enough = search(model, batch=1).n_expanded
    states = []
    for budget in range(1, enough + 1):
        mode = search(model, batch=1, max_expansions=budget)
        assert mode.n_expanded == budget
        outside = [x for ids, x in finished.items() if ids not in mode.sequences]
        assert mode.bound >= max(outside) - 1e-6
        assert not mode.proved or mode.sequences[0] == best
        assert mode.complete == (budget == enough)
        states.append((mode.proved, mode.complete))
    assert states[0] == (False, False)
    # best of all first, then the runner-up
    assert states == sorted(states)
    assert seed == 6 or (True, False) in states


def with_logits(logits):
    """A model that predicts the same five logits everywhere."""
    model = small(0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.tensor(logits, dtype=torch.float64))
    return model


def test_completions_that_are_cut_never_win():
    total = math.exp(3) + 4
    mode = search(with_logits([3.0, 0, 0, 0, 0]), max_new_tokens=3)
    assert mode.proved
    assert mode.sequences[0] == (EOS,)
    assert mode.logprob == near(-math.log(total))
    assert mode.runner_up == near(3 - 2 * math.log(total))
    # three times token 0 is more probable by far, and never ends
    assert mode.cut_bound == near(9 - 3 * math.log(total))
    assert mode.cut_bound > mode.logprob


def test_more_than_one_token_can_end_a_completion():
    model = small(5)
    finished, _ = law(model, PROMPT, 3, eos_ids=(2, 4))
    mode = search(model, eos_ids=(2, 4), max_new_tokens=3, above=-60.0)
    assert mode.sequences == [ids for ids, _ in ranked(finished)]
    assert mode.finished_mass + mode.cut_mass == near(1.0)


def test_an_end_named_twice_is_one_end():
    once, twice = search(small(5)), search(small(5), eos_ids=(EOS, EOS))
    assert twice == once
    assert twice.runner_up < twice.logprob


def test_a_scorer_that_disagrees_is_no_proof(monkeypatch):
    model = small(3)
    truth = search(model)
    assert truth.proved
    assert 0 < truth.rounding < 1e-5
    off = {"by": 4e-5}
    scored = search_module._scored
    monkeypatch.setattr(
        search_module, "_scored", lambda *args: [x - off["by"] for x in scored(*args)]
    )
    assert search(model).proved
    off["by"] = 6e-5
    mode = search(model)
    assert not mode.proved
    assert mode.sequences == truth.sequences
    assert mode.rounding == pytest.approx(6e-5, abs=1e-5)


def test_rounding_never_lifts_a_child_above_its_parent():
    tree = Tree(eos_ids=(0,), depth=3, gamma=0.0, above=None, tolerance=1e-4)
    assert tree.take(1) == [()]
    tree.grow([()], torch.tensor([[-50.0, 1e-17]], dtype=torch.float64))
    assert tree.take(1) == [(1,)]
    tree.grow([(1,)], torch.tensor([[1e-17, -50.0]], dtype=torch.float64))
    assert tree.listed() == {(1, 0): 0.0, (0,): -50.0}
    assert tree.finished_mass == 1.0 + math.exp(-50)


def test_where_the_greedy_dive_stands_is_still_open():
    tree = Tree(eos_ids=(0,), depth=3, gamma=0.0, above=None, tolerance=1e-4)
    tree.grow(tree.take(1), torch.tensor([[-5.0, -0.1, -3.0]], dtype=torch.float64))
    # the budget may end here: what lies below (1,) is the most that is left
    assert tree.bound == -0.1
    assert tree.take(4) == [(1,)]


def test_nothing_that_ends_is_said_so():
    mode = search(with_logits([0.0, 0, -math.inf, 0, 0]))
    assert (mode.sequences, mode.logprob, mode.runner_up) == ([], -math.inf, -math.inf)
    assert mode.finished_mass == 0
    assert mode.cut_mass == near(1.0)


def test_a_model_of_nan_is_never_a_proof():
    model = small(0)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = torch.nan
    # the prompt holds token 3: every logit is NaN
    mode = search(model)
    assert not mode.proved
    assert not mode.complete
    assert mode.bound == 0.0
    # elsewhere only the prefixes with it are unknown
    mode = search(model, prompt=[1, 4], max_new_tokens=3)
    assert mode.sequences
    assert all(3 not in ids[:-1] for ids in mode.sequences)


@pytest.mark.parametrize("family", ["gpt2-tied", "gemma2-softcap", "mistral-window"])
def test_any_family_is_searched(family):
    model = small(0, family)
    finished, _ = law(model, PROMPT, 3)
    mode = search(model, max_new_tokens=3)
    assert mode.sequences[0] == ranked(finished)[0][0]
    assert mode.logprob == near(ranked(finished)[0][1])


def test_a_shipped_puzzle_is_solved_exactly_and_no_sample_beats_it():
    scorer = Scorer("game24", device="cpu")
    tokenizer = load_tokenizer("game24")
    record = PromptRecord("here", "p", "Numbers: 5 5 6 6 Target: 24\n")
    (prompt,) = render_all([record], tokenizer)
    mode = find_mode(scorer, prompt.ids, [EOS], SearchConfig(max_new_tokens=48))
    assert mode.proved
    assert mode.logprob > math.log(1 / 2)
    sampler = TransformersSampler(scorer.model, tokenizer)
    ((greedy,),) = sampler.sample([prompt], SamplingConfig(temperature=0.0, max_new_tokens=48))
    # Prop. 3.1: above one half, greedy decoding finds it
    assert tuple(greedy.completion_ids[0]) == mode.sequences[0]
    ((drawn,),) = sampler.sample([prompt], SamplingConfig(n=64, max_new_tokens=48))
    assert max(map(math.fsum, drawn.logprobs)) <= mode.logprob + 1e-4
    seen = {tuple(ids) for ids in drawn.completion_ids}
    assert mode.sequences[0] in seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"gamma": 1.0}, r"`gamma` must be in \[0, 1\), got 1.0"),
        ({"above": 0.5}, "`above` must be at most 0 nats, got 0.5"),
        ({"max_expansions": 0}, "`max_expansions` must be at least 1"),
        ({"tolerance": -1.0}, "`tolerance` must be at least 0"),
        ({"max_new_tokens": 62}, "prompt of 3 tokens"),
        ({"prompt": []}, "the prompt must hold at least one token"),
        ({"eos_ids": ()}, "`eos_ids` must hold at least one token"),
        ({"eos_ids": (5,)}, r"token ids must be in \[0, 5\), got 5"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        search(small(), **options)


def test_half_precision_is_refused():
    with pytest.raises(InputError, match=r"must hold an fp32 or fp64 model, got torch\.bfloat16"):
        search(small().bfloat16())
