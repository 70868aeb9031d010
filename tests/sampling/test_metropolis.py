"""Metropolis-Hastings draws from p^alpha: against enumerated laws, and among other samplers."""

import functools
import itertools
import logging
import math

import pytest
import torch

from helpers.power_oracle import (
    PROMPT,
    logprobs,
    power_law,
    random_table,
    small_llama,
    total_variation,
    two_tokens,
)
from helpers.tiny import alone, tiny
from sharpen.errors import InputError
from sharpen.experiments.game24.train_base import build_tokenizer
from sharpen.sampling import Prompt, Sampler, SamplingConfig, metropolis
from sharpen.sampling.hf import TransformersSampler
from sharpen.sampling.metropolis import Metropolis, MetropolisSampler

TOKENIZER = build_tokenizer()
# the models here name their own ends, in other vocabularies
TOKENIZER.eos_token = None
GATE = 0.02
PROMPTS = [
    Prompt(f"p{i}", "", tuple(range(5 + i, 5 + i + length)), f"rows:{i}")
    for i, length in enumerate([4, 7, 4])
]
CONFIG = SamplingConfig(n=4, max_new_tokens=9, seed=3)


def draw_all(model, power, prompts=PROMPTS, config=CONFIG, done=(), **options):
    sampler = MetropolisSampler(model, TOKENIZER, power, **options)
    batches = sampler.sample(prompts, config, done=done)
    return {samples.prompt_id: samples for batch in batches for samples in batch}


def distance(model, power, T, n=6000):
    law, _ = power_law(model, T, power.alpha)
    config = SamplingConfig(n=n, max_new_tokens=T)
    samples = draw_all(model, power, [PROMPT], config, max_tokens=10**6)[PROMPT.id]
    return total_variation(law, samples.completion_ids)


def with_ends(model):
    model.generation_config.eos_token_id = list(range(0, 293, 7))
    return model


TABLE = functools.partial(random_table, 9, 3, 4)
OTHER_PROPOSAL = Metropolis(alpha=3.0, steps=25, proposal_temperature=0.6)


@pytest.mark.parametrize(
    ("model", "T", "power"),
    [
        pytest.param(two_tokens, 2, Metropolis(alpha=4.0, steps=30), id="two-tokens"),
        pytest.param(TABLE, 4, Metropolis(alpha=2.0, steps=40), id="table"),
        pytest.param(TABLE, 4, OTHER_PROPOSAL, id="another-proposal"),
        pytest.param(small_llama, 3, Metropolis(alpha=2.0, steps=25), id="shared-prompt"),
    ],
)
def test_the_law_of_many_chains_is_the_power_distribution(model, T, power):
    assert distance(model(), power, T) < GATE


def without_cut(old, new, cut, alpha, log_ratio=metropolis.log_ratio):
    return log_ratio(old, new, cut, alpha) - old.count.log() + new.count.log()


def of_the_overlap(old, new, cut, alpha, log_ratio=metropolis.log_ratio):
    shorter = torch.minimum(old.count, new.count)
    overlap = metropolis.Chains(**{**vars(old), "count": shorter})
    return log_ratio(overlap, new, cut, alpha) - shorter.log() + old.count.log()


@pytest.mark.parametrize("wrong", [without_cut, of_the_overlap])
def test_a_wrong_ratio_is_told_by_the_gate(wrong, monkeypatch):
    monkeypatch.setattr(metropolis, "log_ratio", wrong)
    assert distance(TABLE(), OTHER_PROPOSAL, 4) > 4 * GATE


def test_low_temperature_prefers_b_and_the_power_distribution_ab():
    a, b = 1, 2
    law, log_z = power_law(two_tokens(), 2, 4.0)
    # .40^4, .25^4 and .25^4, over .9^4
    whole = 0.4**4 + 2 * 0.25**4
    assert law[a, b] == pytest.approx(0.4**4 / whole)
    assert log_z == pytest.approx(math.log(whole / 0.9**4))
    # a lower temperature raises each step to alpha for itself
    cold_V = (two_tokens()(torch.tensor([PROMPT.ids])).logits[0, -1] * 4).softmax(0)
    assert cold_V[b] > 0.7
    assert law[a, b] > 0.5 > law[b, a] + law[b, b]


def test_a_chain_begins_at_the_models_own_sample(monkeypatch):
    model = with_ends(tiny())
    plain = TransformersSampler(model, TOKENIZER).sample(PROMPTS, CONFIG)
    want = {samples.prompt_id: samples for batch in plain for samples in batch}
    never = torch.full((12,), -math.inf, dtype=torch.float64)
    monkeypatch.setattr(metropolis, "log_ratio", lambda old, *_: never[: len(old.count)])
    for name, samples in draw_all(model, Metropolis(steps=2)).items():
        assert samples.completion_ids == want[name].completion_ids
        assert samples.logprobs == want[name].logprobs
        assert samples.finish_reasons == want[name].finish_reasons
        assert samples.accepted == [0.0] * 4


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_logprobs_are_the_models_own_and_chains_depend_on_nothing_around(family):
    model, power = with_ends(tiny(family)), Metropolis(alpha=3.0, steps=3)
    together = draw_all(model, power)
    assert len({len(ids) for s in together.values() for ids in s.completion_ids}) > 2
    assert 0 < sum(sum(s.accepted) for s in together.values()) < 12
    for prompt in PROMPTS:
        samples = together[prompt.id]
        want = alone(model, [list(prompt.ids)], [samples.completion_ids]).tolist()
        assert list(itertools.chain(*samples.logprobs)) == pytest.approx(want, abs=2e-5)
    others = (
        # one prompt a batch, the longer one cut in two
        draw_all(model, power, max_tokens=40),
        draw_all(model, power, PROMPTS[::-1], sharing="none"),
        draw_all(model, power, config=SamplingConfig(n=2, max_new_tokens=9, seed=3)),
    )
    for other in others:
        assert set(other) == set(together)
        for name, samples in other.items():
            n = len(samples.accepted)
            assert samples.completion_ids == together[name].completion_ids[:n]
            assert samples.accepted == together[name].accepted[:n]


def test_seed_moves_and_done():
    model, power = with_ends(tiny()), Metropolis(alpha=2.0, steps=3)
    first = draw_all(model, power)
    assert first == draw_all(model, power)
    rest = draw_all(model, power, done={"p0", "p2"})
    assert rest == {name: first[name] for name in ("p1",)}
    for other in (
        draw_all(model, power, PROMPTS[1:2], SamplingConfig(n=4, max_new_tokens=9, seed=4)),
        draw_all(model, Metropolis(alpha=2.0, steps=4), PROMPTS[1:2]),
    ):
        assert other["p1"].completion_ids != first["p1"].completion_ids


def test_chains_from_a_later_index_are_the_last_of_all():
    model, power = with_ends(tiny()), Metropolis(alpha=2.0, steps=2)
    every = draw_all(model, power, PROMPTS[:1])["p0"]
    config = SamplingConfig(n=2, max_new_tokens=9, seed=3, first=2)
    assert (
        draw_all(model, power, PROMPTS[:1], config)["p0"].completion_ids
        == (every.completion_ids[2:])
    )


def test_at_alpha_infinity_chains_climb():
    model, T = random_table(3, 4, 4, scale=1.0), 4
    known = logprobs(model, T)
    config = SamplingConfig(n=50, max_new_tokens=T)
    before = None
    for steps in (1, 5, 40):
        power = Metropolis(alpha=math.inf, steps=steps, proposal_temperature=0.5)
        samples = draw_all(model, power, [PROMPT], config)[PROMPT.id]
        now = torch.tensor([known[tuple(ids)] for ids in samples.completion_ids])
        assert before is None or bool((now >= before).all())
        before = now
    assert before.tolist() == pytest.approx([max(known.values())] * 50)


def test_a_prompt_is_read_once_for_all_moves():
    model = tiny()
    sampler = MetropolisSampler(model, TOKENIZER, Metropolis(steps=3))
    assert isinstance(sampler, Sampler)
    assert sampler.route == "shared"
    seen = []
    model.register_forward_pre_hook(
        lambda _m, _args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    list(sampler.sample([PROMPTS[0], PROMPTS[2]], SamplingConfig(n=3, max_new_tokens=4)))
    assert [shape for shape in seen if shape[1] > 1] == [(2, 4)]
    # one token a row; rows that ended are not run
    assert len(seen) <= 1 + 4 * 3
    assert {shape[1] for shape in seen[1:]} == {1}


def test_whole_sequences_where_nothing_is_shared_said_once(caplog):
    caplog.set_level(logging.INFO, "sharpen")
    sampler = MetropolisSampler(two_tokens(), TOKENIZER, Metropolis(steps=2), sharing="none")
    for seed in range(2):
        list(sampler.sample([PROMPT], SamplingConfig(n=2, max_new_tokens=2, seed=seed)))
    assert caplog.text.count("whole sequences are read again at every token") == 1


def test_nan_is_never_entered_and_is_told():
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[200:] = float("nan")
    poisoned = Prompt("bad", "", (5, 200, 7, 8), "rows:9")
    prompts, config = [*PROMPTS, poisoned], SamplingConfig(n=12, max_new_tokens=3)
    plain = TransformersSampler(model, TOKENIZER).sample(prompts, config)
    began = {samples.prompt_id: samples for batch in plain for samples in batch}
    got = draw_all(model, Metropolis(alpha=1.0, steps=6), prompts, config)
    assert got["bad"].finish_reasons == ["nan"] * 12
    assert got["bad"].accepted == [0.0] * 12
    for name, samples in got.items():
        stuck = [reason == "nan" for reason in began[name].finish_reasons]
        assert [reason == "nan" for reason in samples.finish_reasons] == stuck
        assert name == "bad" or (any(stuck) and not all(stuck))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.5}, "`alpha` must be at least 1, got 0.5"),
        ({"alpha": math.nan}, "`alpha` must be at least 1, got nan"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"proposal_temperature": 0.0}, "`proposal_temperature` must be above 0 and finite"),
        ({"alpha": math.inf}, "`proposal_temperature` must be given with alpha inf"),
    ],
)
def test_settings_that_cannot_be_walked_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Metropolis(**options)


def test_a_broken_number_of_moves_is_refused():
    # the types that tests run under would refuse it before
    power = Metropolis()
    object.__setattr__(power, "steps", 2.5)
    with pytest.raises(InputError, match=r"`steps` must be a whole number, got 2\.5"):
        power.__post_init__()


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"top_p": 0.9}])
def test_the_callers_temperature_is_refused(options):
    with pytest.raises(InputError, match="must be 1 for a sampler of the power distribution"):
        draw_all(tiny(), Metropolis(), config=SamplingConfig(**options))
