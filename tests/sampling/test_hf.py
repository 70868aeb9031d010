import pytest
import torch
from transformers import GenerationConfig

from helpers.tiny import CONTEXT, FAMILIES, tiny
from sharpen.errors import InputError
from sharpen.experiments.game24.train_base import build_tokenizer
from sharpen.sampling import Prompt, SamplingConfig
from sharpen.sampling.hf import TransformersSampler
from sharpen.scoring import Scorer

TOKENIZER = build_tokenizer()
# two lengths, so that batches differ between budgets
PROMPTS = [
    Prompt(f"p{i}", "", tuple(range(5 + i, 5 + i + length)), f"rows:{i}")
    for i, length in enumerate([4, 7, 4, 1, 7])
]
CONFIG = SamplingConfig(n=6, max_new_tokens=9, seed=3)


def sampler(model, **options):
    return TransformersSampler(model, TOKENIZER, **options)


def draw_all(model, prompts=PROMPTS, config=CONFIG, done=(), **options):
    batches = sampler(model, **options).sample(prompts, config, done=done)
    return {samples.prompt_id: samples for batch in batches for samples in batch}


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt2-tied", "gemma2-softcap"])
def test_samples_do_not_depend_on_the_batch_they_ran_in(family):
    model = tiny(family)
    together = draw_all(model)
    assert list(together) == ["p3", "p0", "p2", "p1", "p4"]  # by length, then in order
    for other in (
        draw_all(model, max_tokens=40),
        draw_all(model, max_tokens=1),
        draw_all(model, PROMPTS[::-1]),
        draw_all(model, PROMPTS[2:3]),
    ):
        for name, samples in other.items():
            assert samples.completion_ids == together[name].completion_ids
            for got, want in zip(samples.logprobs, together[name].logprobs, strict=True):
                assert got == pytest.approx(want, abs=2e-5)


def test_first_samples_do_not_depend_on_n():
    model = tiny()
    few = draw_all(model, config=SamplingConfig(n=2, max_new_tokens=9, seed=3))
    many = draw_all(model)
    assert all(few[p].completion_ids == many[p].completion_ids[:2] for p in few)


def test_greedy_ties_are_the_scorers_and_those_of_generate():
    model = tiny("llama")
    with torch.no_grad():
        # every column of the head has a twin with a higher id
        half = model.config.vocab_size // 2
        model.lm_head.weight[half : 2 * half] = model.lm_head.weight[:half]
    config = SamplingConfig(n=1, temperature=0.0, max_new_tokens=9)
    drawn = draw_all(model, config=config)
    scorer = Scorer(model)
    for prompt in PROMPTS:
        (ids,) = drawn[prompt.id].completion_ids
        assert max(ids) < half
        stats = ("rank", "is_greedy", "top1")
        tokens = scorer.score([prompt.ids], [[ids]], stats=stats).tokens
        assert tokens.rank is not None
        assert (tokens.rank == 1).all()
        assert tokens.is_greedy is not None
        assert tokens.is_greedy.all()
        assert tokens.top1 is not None
        assert tokens.top1.tolist() == ids
        context = torch.tensor([prompt.ids])
        eos = list(sampler(model).eos_ids) or None
        whole = model.generate(context, max_new_tokens=9, do_sample=False, eos_token_id=eos)
        assert whole[0, len(prompt.ids) :].tolist() == ids


def test_a_restart_gives_the_same_bits():
    model = tiny()
    whole = draw_all(model, max_tokens=100)
    rest = draw_all(model, max_tokens=100, done={"p0", "p3"})
    assert set(rest) == {"p1", "p2", "p4"}
    assert all(rest[name] == whole[name] for name in rest)


def test_seed_prompt_and_index_all_matter():
    model = tiny()
    one, other = draw_all(model), draw_all(model, config=SamplingConfig(6, 1.0, 1.0, 9, seed=4))
    assert one["p0"].completion_ids != other["p0"].completion_ids
    assert len({tuple(ids) for ids in one["p0"].completion_ids}) == 6
    renamed = [Prompt("other", "", PROMPTS[0].ids, "rows:0")]
    assert draw_all(model, renamed)["other"].completion_ids != one["p0"].completion_ids


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.3, 0.8)])
def test_logprobs_are_the_models_own_whatever_the_draw_used(temperature, top_p):
    model = tiny("qwen3")
    config = SamplingConfig(n=4, temperature=temperature, top_p=top_p, max_new_tokens=9)
    samples = draw_all(model, config=config)["p1"]
    for ids, logprobs in zip(samples.completion_ids, samples.logprobs, strict=True):
        row = torch.tensor([list(PROMPTS[1].ids) + ids])
        want = model(row).logits[0, :-1].log_softmax(1).gather(1, row[0, 1:, None]).squeeze(1)
        assert logprobs == pytest.approx(want[len(PROMPTS[1].ids) - 1 :].tolist(), abs=1e-5)


def test_first_tokens_follow_the_models_distribution():
    model = tiny()
    n = 3000
    config = SamplingConfig(n=n, max_new_tokens=1)
    ids = draw_all(model, PROMPTS[:1], config)["p0"].completion_ids
    seen = torch.bincount(torch.tensor(ids).flatten(), minlength=293) / n
    want = model(torch.tensor([PROMPTS[0].ids])).logits[0, -1].softmax(0)
    # total variation of n draws from k likely tokens is about sqrt(k / (2 pi n))
    assert 0.5 * (seen - want).abs().sum().item() < 3 * (want.sqrt().sum() ** 2 / n).sqrt() / 2.5


@pytest.mark.parametrize("family", FAMILIES)
def test_temperature_zero_gives_the_tokens_of_generate(family):
    model = tiny(family)
    config = SamplingConfig(temperature=0.0, max_new_tokens=12)
    got = draw_all(model, config=config)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt.ids])
        want = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
        )[0, len(prompt.ids) :].tolist()
        assert got[prompt.id].completion_ids == [want]


def test_finish_reasons_and_the_end_token():
    model = tiny()
    # half of the vocabulary ends a completion
    model.generation_config.eos_token_id = list(range(0, 293, 2))
    samples = list(draw_all(model, config=SamplingConfig(40, max_new_tokens=3)).values())
    reasons = {reason for s in samples for reason in s.finish_reasons}
    assert reasons == {"stop", "length"}
    for s in samples:
        for ids, reason in zip(s.completion_ids, s.finish_reasons, strict=True):
            assert (ids[-1] % 2 == 0) == (reason == "stop")
            assert all(token % 2 for token in ids[:-1])
            assert len(ids) == 3 or reason == "stop"
        assert [len(x) for x in s.logprobs] == [len(x) for x in s.completion_ids]


def test_penalties_of_the_checkpoint_do_not_bend_the_distribution():
    plain, bent = tiny(), tiny()
    bent.generation_config = GenerationConfig(
        repetition_penalty=3.0, no_repeat_ngram_size=1, suppress_tokens=[7], eos_token_id=2
    )
    before = bent.generation_config
    assert draw_all(bent) == draw_all(plain)
    assert bent.generation_config is before


def test_training_mode_is_left_as_it_was():
    model = tiny().train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    first = draw_all(model)
    assert [module.training for module in model.modules()] == flags
    assert first == draw_all(model.eval())


def test_nan_stays_in_its_prompt_and_is_told():
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[200] = float("nan")
    poisoned = Prompt("bad", "", (5, 200, 7, 8), "rows:9")
    got = draw_all(model, [*PROMPTS, poisoned])
    assert got["bad"].finish_reasons == ["nan"] * 6
    assert got["bad"].completion_ids == [[]] * 6
    clean = draw_all(tiny())
    for prompt in PROMPTS[::2]:
        same = [i for i, ids in enumerate(clean[prompt.id].completion_ids) if 200 not in ids]
        assert same
        for i in same:
            assert got[prompt.id].completion_ids[i] == clean[prompt.id].completion_ids[i]


def test_near_ties_are_settled_on_the_row_alone(monkeypatch):
    # every token has a twin with the same weights, so that every draw is a tie
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[146:292] = model.lm_head.weight[:146]
    settled = []
    forward = model.forward

    def spy(*args, **kwargs):
        if kwargs.get("use_cache") is False:
            settled.append(kwargs["input_ids"].tolist())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    config = SamplingConfig(temperature=0.0, max_new_tokens=8)
    ids = [{k: s.completion_ids for k, s in draw_all(model, config=config).items()}]
    ids.append(
        {k: s.completion_ids for k, s in draw_all(model, config=config, max_tokens=1).items()}
    )
    assert ids[0] == ids[1]
    assert len(settled) >= len(PROMPTS)
    assert all(len(rows) == 1 for rows in settled)


@pytest.mark.parametrize(
    ("ids", "new", "message"),
    [
        ((), 4, "rows:0: the prompt must hold at least one token"),
        ((1, 293), 4, r"rows:0: token ids must be in \[0, 293\), got 293 at position 1"),
        (
            tuple(range(60)),
            5,
            rf"rows:0: prompt of 60 tokens .* fit the model's context of {CONTEXT}",
        ),
    ],
)
def test_prompts_the_model_cannot_read_are_named(ids, new, message):
    prompt = Prompt("p", "", ids, "rows:0")
    with pytest.raises(InputError, match=message):
        draw_all(tiny(), [prompt], SamplingConfig(max_new_tokens=new))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "`n` must be at least 1, got 0"),
        ({"temperature": -1.0}, "`temperature` must be at least 0"),
        ({"temperature": float("nan")}, "`temperature` must be at least 0"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0.0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
    ],
)
def test_settings_that_cannot_be_drawn_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SamplingConfig(**options)
