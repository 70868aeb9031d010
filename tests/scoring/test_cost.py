"""Where nothing is shared, or a model falls back, a call costs no more than padded batches."""

import pytest
import torch

from bench._measure import peak_extra_mib
from helpers.families import CACHE, V, family
from sharpen import Scorer
from sharpen.scoring import token_stats
from sharpen.scoring.packing import plan


def ids(n, seed):
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def batches_of(scorer, prompts, completions):
    """Shape of the ids of each forward of a call."""
    assert scorer.route
    seen = []
    handle = scorer.model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _out: seen.append(tuple(args[0].shape))
    )
    scorer.score(prompts, completions)
    handle.remove()
    return seen


HEADER = ids(20, 0)
UNSHARED = {
    "one completion": ([ids(30, 1)], [[ids(9, 2)]]),
    "one each": ([ids(30, 1), ids(7, 3)], [[ids(9, 2)], [ids(4, 4)]]),
    "one that is not empty": ([ids(30, 1)], [[[], ids(9, 2), []]]),
    "a header too short to cut": ([[*HEADER[:5], 1], [*HEADER[:5], 2]], [[ids(9, 2)]] * 2),
}
SHARED = {
    "a prompt": ([ids(30, 1)], [[ids(9, 2), ids(4, 3)]]),
    "a prompt given twice": ([ids(30, 1), [9], ids(30, 1)], [[ids(9, 2)], [[3]], [ids(4, 3)]]),
    "a header": ([[*HEADER, 1], [*HEADER, 2]], [[ids(9, 2)]] * 2),
    "a beginning": ([[5, 6], [5]], [[[7, 8]], [[6, 7, 9, 9]]]),
}


@pytest.mark.parametrize("name", UNSHARED)
def test_nothing_to_share_takes_whole_sequences(name, monkeypatch):
    model = family("llama")
    scorers = {way: Scorer(model, sharing=way) for way in ("auto", "none", "tree")}
    seen = {way: batches_of(scorer, *UNSHARED[name]) for way, scorer in scorers.items()}
    assert seen["auto"] == seen["none"]
    assert len(seen["tree"]) == 1
    assert scorers["auto"].route.sharing == "tree"
    want = scorers["none"].score(*UNSHARED[name]).tokens.logprob
    for way in ("auto", "tree"):
        got = scorers[way].score(*UNSHARED[name]).tokens.logprob
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    monkeypatch.setattr(token_stats, "_run_packed", None)
    scorers["auto"].score(*UNSHARED[name])
    with pytest.raises(TypeError):  # a way that is asked for by name is taken
        scorers["tree"].score(*UNSHARED[name])


@pytest.mark.parametrize("name", SHARED)
def test_what_is_shared_is_read_once(name):
    prompts, completions = SHARED[name]
    pairs = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    assert plan(pairs, 2**14).shares
    model = family("llama")
    (tree,) = batches_of(Scorer(model), prompts, completions)
    whole = batches_of(Scorer(model, sharing="none"), prompts, completions)
    assert tree[0] == 1
    assert tree[1] < sum(len(p) + len(c) - 1 for p, c in pairs) <= sum(b * t for b, t in whole)


@pytest.mark.parametrize("name", CACHE)
def test_a_cache_reads_no_more_than_padded_batches(name):
    model = family(name)
    auto, whole = Scorer(model), Scorer(model, sharing="none")
    assert auto.route.sharing == "cache"
    for given in (*UNSHARED.values(), ([ids(15, 1)], [[ids(9, 2), ids(4, 3)]])):
        assert batches_of(auto, *given) == batches_of(whole, *given)
    many = [ids(40, 1), ids(16, 2)], [[ids(n, n) for n in (9, 1, 30)], [ids(3, 1), ids(5, 2)]]
    read, plain = (sum(b * t for b, t in batches_of(s, *many)) for s in (auto, whole))
    assert read < plain


# states and keys; keys alone
@pytest.mark.parametrize("name", ["lfm2", "llama4_text"])
@pytest.mark.parametrize("training", [False, True])
def test_a_cache_holds_no_more_than_padded_batches(name, training):
    model = family(name)
    given = [ids(60, 1)], [[ids(n, n) for n in range(10, 26)]]

    def peak(scorer):
        assert scorer.route

        def run():
            if training:
                scorer.logprobs(*given).sum().backward()
            else:
                scorer.score(*given)

        run()  # gradients are there, and what a library makes at first use
        return peak_extra_mib(run, "cpu")

    assert peak(Scorer(model)) <= 1.05 * peak(Scorer(model, sharing="none"))
