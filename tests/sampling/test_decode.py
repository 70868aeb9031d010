"""Decoding on one copy of a prompt changes what is computed, not which tokens come out."""

import logging

import pytest
import torch

from helpers.families import TREE, V, family
from sharpen.errors import InputError
from sharpen.experiments.game24.train_base import build_tokenizer
from sharpen.sampling import Prompt, SamplingConfig
from sharpen.sampling.decode import decode
from sharpen.sampling.hf import TransformersSampler
from sharpen.sampling.prompt_cache import PromptCache, PromptPlan
from sharpen.scoring.hooks import NAMES, install, under

TOKENIZER = build_tokenizer()
# more than one prompt of a length, shorter and longer than the windows
PROMPTS = [
    Prompt(f"p{i}", "", tuple((7 * i + 3 * j) % V for j in range(length)), f"rows:{i}")
    for i, length in enumerate([4, 19, 4, 1, 19])
]
# chunks of tokens are a stretch too, so Llama 4 decodes on shared prompts
SHARED = [*TREE, "llama4_text"]


def sampler(model, sharing="auto", **options):
    return TransformersSampler(model, TOKENIZER, sharing=sharing, **options)


def run(model, config, sharing="auto", **options):
    batches = sampler(model, sharing, **options).sample(PROMPTS, config)
    return {samples.prompt_id: samples for batch in batches for samples in batch}


@pytest.mark.parametrize("name", SHARED)
def test_greedy_tokens_are_those_of_generate(name):
    model = family(name)
    want = {}
    for prompt in PROMPTS:
        ids = torch.tensor([prompt.ids])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=17,
            pad_token_id=0,
        )
        want[prompt.id] = out[0, len(prompt.ids) :].tolist()
    assert sampler(model).route == "shared"
    got = run(model, SamplingConfig(n=2, temperature=0.0, max_new_tokens=17))
    assert {name: samples.completion_ids for name, samples in got.items()} == {
        name: [ids, ids] for name, ids in want.items()
    }


@pytest.mark.parametrize("name", [*SHARED, "lfm2"])
def test_samples_do_not_depend_on_the_way(name):
    model = family(name)
    # rows end at different steps
    model.generation_config.eos_token_id = list(range(0, V, 13))
    config = SamplingConfig(n=5, max_new_tokens=20, seed=1)
    alone = run(model, config, "none")
    for together in (run(model, config), run(model, config, max_tokens=50)):
        for prompt, samples in together.items():
            assert samples.completion_ids == alone[prompt].completion_ids
            assert samples.finish_reasons == alone[prompt].finish_reasons
            for got, want in zip(samples.logprobs, alone[prompt].logprobs, strict=True):
                assert got == pytest.approx(want, abs=2e-5)


def test_a_prompt_is_read_once_and_ended_rows_cost_nothing():
    model = family("llama")
    install(model)
    seen = []
    model.register_forward_pre_hook(
        lambda _m, _args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    ends = torch.tensor([1, 3, 3, 2])

    def take(rows, logits):
        assert len(logits) == len(rows)
        step = len(seen)
        return torch.zeros_like(rows), (step < ends[rows]).nonzero().flatten()

    with torch.no_grad():
        decode(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), [3, 1], take)
    assert [tuple(shape) for shape in seen] == [(2, 3), (3, 1), (2, 1)]


def test_keys_of_a_prompt_are_there_once():
    model = family("llama")
    install(model)
    cache = PromptCache()
    with torch.no_grad(), under(PromptPlan(cache)):
        model(torch.tensor([[1, 2, 3, 4]]), past_key_values=cache, use_cache=True)
    cache.fork([6], torch.device("cpu"))
    assert [k.shape for k, _ in cache.prompts.values()] == [(1, 2, 4, 8)] * 2
    layer = cache.layers[0]
    assert layer.keys is None
    layer.update(*(torch.zeros(6, 2, 1, 8) for _ in range(2)))
    assert layer.get_seq_length() == 5
    for _ in range(16):  # past the room that a row has at first
        keys, _ = layer.update(*(torch.ones(6, 2, 1, 8) for _ in range(2)))
    assert keys[0, 0, :, 0].tolist() == [0.0] + [1.0] * 16
    cache.keep([0, 2])
    assert layer.keys.shape[0] == 2


@pytest.mark.parametrize("name", ["bamba", "lfm2", "qwen3_next", "falcon_h1", "nemotron_h"])
def test_a_recurrent_model_keeps_its_own_generate(name, caplog):
    caplog.set_level(logging.INFO, "sharpen")
    model = family(name)
    before = model.config._attn_implementation
    assert sampler(model).route == "generate"
    assert model.config._attn_implementation == before
    assert "decodes by 'generate'" in caplog.text
    with pytest.raises(InputError, match="`sharing` must be a way in which"):
        _ = sampler(model, "shared").route
    with pytest.raises(InputError, match=r"`sharing` must be one of .* got 'tree'"):
        sampler(model, "tree")


def test_a_model_that_decodes_wrong_is_found_out(monkeypatch):
    def first_ones(self, rows):
        self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]

    monkeypatch.setattr("sharpen.sampling.prompt_cache.OwnLayer.keep", first_ones)
    assert sampler(family("llama")).route == "generate"


def test_a_sampler_leaves_a_scorers_hooks(monkeypatch):
    model = family("llama")
    install(model)
    monkeypatch.setattr("sharpen.sampling.decode._fault", lambda *_: "it was broken for a test")
    assert sampler(model).route == "generate"
    assert model.config._attn_implementation in NAMES.values()


def test_prompts_and_their_sequences_on_one_side_of_a_rotary_boundary():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "original_max_position_embeddings": 24,
    }
    model = family("phi3", rope_parameters=rope)
    config = SamplingConfig(n=2, max_new_tokens=12, seed=1)
    together, alone = run(model, config), run(model, config, "none")
    for prompt, samples in together.items():
        assert samples.completion_ids == alone[prompt].completion_ids


@pytest.mark.parametrize("name", [*SHARED, "lfm2"])
def test_half_precision_takes_the_way_of_fp32(name):
    model = family(name).to(torch.bfloat16)
    assert sampler(model).route == ("generate" if name == "lfm2" else "shared")
