"""Moves decode what they draw: kept tokens stay in the cache, and rejected ones leave no trace."""

import pytest
import torch

from helpers.families import V, family
from sharpen.experiments.game24.train_base import build_tokenizer
from sharpen.sampling import Prompt, SamplingConfig
from sharpen.sampling.metropolis import Metropolis, MetropolisSampler
from sharpen.sampling.prompt_cache import COPIES, ChainCache, PromptCache

TOKENIZER = build_tokenizer()
PROMPTS = [
    Prompt(f"p{i}", "", tuple((7 * i + 3 * j) % V for j in range(length)), f"rows:{i}")
    for i, length in enumerate([4, 9, 4, 9])
]
CONFIG = SamplingConfig(n=3, max_new_tokens=12, seed=2)


def ending(name):
    model = family(name)
    # chains of many lengths: prompts lose all of their rows and get them back
    model.generation_config.eos_token_id = list(range(0, V, 11))
    return model


def chains(sampler):
    return [x for finished in sampler.sample(PROMPTS, CONFIG) for x in finished]


@pytest.mark.parametrize("max_tokens", [65536, 60])
def test_the_model_reads_what_is_drawn_and_a_token_before_it(max_tokens):
    model, power = ending("llama"), Metropolis(alpha=2.0, steps=6)
    sampler = MetropolisSampler(model, TOKENIZER, power, max_tokens=max_tokens)
    assert sampler.route == "shared"
    seen = []
    model.register_forward_pre_hook(
        lambda _m, _args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = chains(sampler)
    drawn = sum(sum(x.drawn) for x in found)
    again = sum(sum(x.read_again) for x in found)
    n_draws = len(found) * CONFIG.n * (1 + power.steps)
    # the last token of a draw is never read
    near_ties = sum(L for B, L in seen if B == 1 and max(len(p.ids) for p in PROMPTS) < L)
    assert near_ties == 0
    assert sum(B for B, L in seen if L == 1) == drawn - n_draws + again
    assert 0 < again < n_draws
    batches = sum(L > 1 for _, L in seen)
    assert (batches == 2) == (max_tokens == 65536)


@pytest.mark.parametrize(
    "name", ["llama", "mistral/short window", "gemma2", "gpt_oss", "llama4_text", "deepseek_v3"]
)
def test_chains_are_those_of_whole_sequences(name):
    power = Metropolis(alpha=2.0, steps=5)
    shared, whole = (
        chains(MetropolisSampler(ending(name), TOKENIZER, power, sharing=way))
        for way in ("shared", "none")
    )
    assert {a for x in shared for a in x.accepted} >= {0.2, 0.4}
    for got, want in zip(shared, whole, strict=True):
        assert got.completion_ids == want.completion_ids
        assert (got.accepted, got.drawn) == (want.accepted, want.drawn)
        for a, b in zip(got.logprobs, want.logprobs, strict=True):
            assert a == pytest.approx(b, abs=2e-5)


def test_a_batch_holds_what_its_chains_need():
    sampler = MetropolisSampler(
        ending("llama"), TOKENIZER, Metropolis(steps=1), max_tokens=4 + 2 * COPIES * 12
    )
    sizes = []
    run = sampler._run
    sampler._run = lambda prompts, batch, config: (
        sizes.append([share.stop - share.start for share in batch]),
        run(prompts, batch, config),
    )[1]
    chains(sampler)
    assert sizes[0] == [1]
    assert max(map(sum, sizes)) <= 2


def written(cache, rows, L, value):
    cache.take(torch.tensor(rows), L)
    x = torch.full((len(rows), 1, 1, 2), float(value))
    return cache.layers[0].update(x, x)[0][:, 0, :, 0].tolist()


def test_rows_come_back_as_they_were_left():
    read = PromptCache()
    module = torch.nn.Identity()
    prompt = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    read.remember(module, prompt, prompt)
    read.layers.append(read.layer_class_to_replicate())
    read.layers[0].update(prompt, prompt)
    cache = ChainCache(read, [2, 1, 1], T=4)
    assert written(cache, [0, 1, 3], 0, 1) == [[1], [1], [1]]
    assert cache.prompts[module][0][:, 0, 0, 0].tolist() == [0, 2]
    assert cache.counts == [2, 1]
    assert written(cache, [1, 3], 1, 2) == [[1, 2], [1, 2]]
    cache.begin()
    # row 1 is drawn again from its second token, row 0 from its first
    assert written(cache, [0], 0, 7) == [[7]]
    assert written(cache, [0, 1], 1, 8) == [[7, 8], [1, 8]]
    cache.settle(torch.tensor([True, False, True, True]))
    assert written(cache, [0, 1, 3], 2, 9) == [[7, 8, 9], [1, 2, 9], [1, 2, 9]]
    assert cache.get_seq_length() == 2 + 3
