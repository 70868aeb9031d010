"""Sequential Monte Carlo draws from p^alpha: enumerated laws, weights by hand, copied caches."""

import itertools
import math
from collections import Counter

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
from sharpen.sampling import Prompt, Sampler, SamplingConfig
from sharpen.sampling.hf import TransformersSampler
from sharpen.sampling.smc import ParticleFilter, ParticleSampler

TOKENIZER = build_tokenizer()
# the models here name their own ends, in other vocabularies
TOKENIZER.eos_token = None
GATE = 0.02
PROMPTS = [
    Prompt(f"p{i}", "", tuple(range(5 + i, 5 + i + length)), f"rows:{i}")
    for i, length in enumerate([4, 7, 4])
]
CONFIG = SamplingConfig(n=6, max_new_tokens=9, seed=3)
OFTEN = {"every": 1, "threshold": 1.0}


def draw_all(model, power, prompts=PROMPTS, config=CONFIG, done=(), **options):
    sampler = ParticleSampler(model, TOKENIZER, power, **options)
    batches = sampler.sample(prompts, config, done=done)
    return {samples.prompt_id: samples for batch in batches for samples in batch}


def with_ends(model):
    model.generation_config.eos_token_id = list(range(0, 293, 7))
    return model


def table():
    return random_table(9, 3, 4)


@pytest.mark.parametrize(
    ("model", "T", "options"),
    [
        pytest.param(two_tokens, 2, {"alpha": 4.0, **OFTEN}, id="two-tokens"),
        pytest.param(table, 4, {"alpha": 2.0, "every": 1}, id="table"),
        pytest.param(table, 4, {"alpha": 3.0, "ramp": 3, **OFTEN}, id="ramp"),
        pytest.param(table, 4, {"alpha": 3.0, "ramp": 9, **OFTEN}, id="longer-ramp"),
        pytest.param(table, 4, {"alpha": 2.0, "threshold": 0.0}, id="never-resampled"),
        pytest.param(
            table, 4, {"alpha": 3.0, "proposal_temperature": 0.9, **OFTEN}, id="another-proposal"
        ),
        pytest.param(small_llama, 3, {"alpha": 2.0, **OFTEN}, id="shared-prompt"),
    ],
)
def test_the_law_of_many_particles_is_the_power_distribution(model, T, options):
    power = ParticleFilter(particles=6000, **options)
    law, log_z = power_law(model(), T, power.alpha)
    config = SamplingConfig(n=6000, max_new_tokens=T)
    samples = draw_all(model(), power, [PROMPT], config, max_tokens=10**6)[PROMPT.id]
    assert total_variation(law, samples.completion_ids) < GATE
    assert samples.log_z == pytest.approx(log_z, abs=0.05)
    # the first token's weights are one number, at 1 / alpha and without a ramp
    assert (samples.n_resampled > 0) == (options.get("threshold") == 1.0 and T > 2)
    assert 1 <= samples.effective_size <= 6000


@pytest.mark.parametrize("options", [OFTEN, {"every": 2, "threshold": 1.0, "ramp": 3}])
def test_few_particles_are_unbiased_after_weighing_by_z(options):
    law, log_z = power_law(table(), 4, 2.0)
    power = ParticleFilter(alpha=2.0, particles=3, **options)
    prompts = [Prompt(f"q{i}", "", PROMPT.ids, "rows:0") for i in range(3000)]
    config = SamplingConfig(n=1, max_new_tokens=4)
    found = list(draw_all(table(), power, prompts, config, max_tokens=10**6).values())
    z = torch.tensor([samples.log_z for samples in found], dtype=torch.float64).exp()
    error = z.std() / len(z) ** 0.5
    assert abs(z.mean() - math.exp(log_z)) < 3 * error < 0.05 * math.exp(log_z)
    ids = [samples.completion_ids[0] for samples in found]
    assert total_variation(law, ids, z.tolist()) < 1.5 * GATE < total_variation(law, ids)
    assert sum(samples.n_resampled for samples in found) > 1000


def test_one_particle_weighs_p_to_alpha_over_q():
    model, T, tau = table(), 4, 0.8
    known = logprobs(model, T)
    tables = [z.double() / tau for z in model.tables]
    for seed in range(20):
        power = ParticleFilter(alpha=3.0, particles=1, ramp=3, every=1, proposal_temperature=tau)
        config = SamplingConfig(n=1, max_new_tokens=T, seed=seed)
        samples = draw_all(model, power, [PROMPT], config)[PROMPT.id]
        (ids,) = samples.completion_ids
        codes = itertools.accumulate(ids, lambda code, token: 3 * code + token, initial=0)
        log_q = sum(
            tables[t].log_softmax(1)[code, token].item()
            for t, (code, token) in enumerate(zip(codes, ids, strict=False))
        )
        assert samples.log_z == pytest.approx(3 * known[tuple(ids)] - log_q, abs=1e-5)


def test_at_alpha_one_particles_are_the_models_own_samples():
    model = with_ends(tiny())
    plain = TransformersSampler(model, TOKENIZER).sample(PROMPTS, CONFIG)
    want = {samples.prompt_id: samples for batch in plain for samples in batch}
    got = draw_all(model, ParticleFilter(alpha=1.0, particles=6, every=1))
    for name, samples in got.items():
        assert sorted(samples.particles) == list(range(6))
        assert samples.particles != list(range(6))
        ids = want[name].completion_ids
        assert samples.completion_ids == [ids[i] for i in samples.particles]
        assert (samples.log_z, samples.n_resampled) == (pytest.approx(0.0, abs=1e-12), 0)


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_copied_particles_go_on_from_their_own_cache(family):
    model = with_ends(tiny(family))
    power = ParticleFilter(alpha=1.5, particles=12, **OFTEN)
    together = draw_all(model, power)
    assert isinstance(ParticleSampler(model, TOKENIZER, power), Sampler)
    assert len({len(ids) for s in together.values() for ids in s.completion_ids}) > 2
    for prompt in PROMPTS:
        samples = together[prompt.id]
        assert samples.n_resampled >= 2
        want = alone(model, [list(prompt.ids)], [samples.completion_ids]).tolist()
        assert list(itertools.chain(*samples.logprobs)) == pytest.approx(want, abs=2e-5)
    for other in (
        draw_all(model, power, max_tokens=120),
        draw_all(model, power, PROMPTS[::-1], sharing="none"),
    ):
        assert set(other) == set(together)
        for name, samples in other.items():
            assert samples.completion_ids == together[name].completion_ids
            assert samples.log_z == pytest.approx(together[name].log_z, abs=1e-3)


def test_seed_done_and_how_often_each_particle_is_drawn():
    model = with_ends(tiny())
    power = ParticleFilter(alpha=1.5, particles=5, threshold=0.0)
    config = SamplingConfig(n=50, max_new_tokens=5)
    first = draw_all(model, power, config=config)
    assert draw_all(model, power, config=config, done={"p0", "p2"}) == {"p1": first["p1"]}
    other = draw_all(model, power, PROMPTS[1:2], SamplingConfig(n=50, max_new_tokens=5, seed=1))
    assert other["p1"].completion_ids != first["p1"].completion_ids
    for samples in first.values():
        by_particle = dict(zip(samples.particles, samples.completion_ids, strict=True))
        assert [by_particle[i] for i in samples.particles] == samples.completion_ids
        # counts are 50 W up to one, and so their squares tell the effective size
        share = [count / 50 for count in Counter(samples.particles).values()]
        assert 1 / sum(w * w for w in share) == pytest.approx(samples.effective_size, rel=0.1)


def test_nan_particles_are_never_drawn_while_others_live():
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[260:] = float("nan")
    poisoned = Prompt("bad", "", (5, 270, 7, 8), "rows:9")
    power = ParticleFilter(alpha=1.0, particles=16, every=2)
    got = draw_all(model, power, [*PROMPTS, poisoned])
    assert got["bad"].finish_reasons == ["nan"] * 6
    assert got["bad"].completion_ids == [[]] * 6
    assert (got["bad"].log_z, got["bad"].effective_size) == (-math.inf, 0.0)
    for prompt in PROMPTS:
        assert set(got[prompt.id].finish_reasons) <= {"stop", "length"}
        # p^1 sums to 1, less what led to NaN
        assert -3 < got[prompt.id].log_z < -0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.5}, "`alpha` must be at least 1 and finite, got 0.5"),
        ({"alpha": math.inf}, "`alpha` must be at least 1 and finite, got inf"),
        ({"particles": 0}, "`particles` must be at least 1, got 0"),
        ({"every": 0}, "`every` must be at least 1, got 0"),
        ({"threshold": 1.5}, r"`threshold` must be in \[0, 1\], got 1.5"),
        ({"ramp": -1}, "`ramp` must be at least 0, got -1"),
        ({"proposal_temperature": math.inf}, "`proposal_temperature` must be above 0 and finite"),
    ],
)
def test_settings_that_cannot_be_led_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ParticleFilter(**options)


@pytest.mark.parametrize("name", ["particles", "every", "ramp"])
def test_broken_numbers_are_refused(name):
    # the types that tests run under would refuse them before
    power = ParticleFilter()
    object.__setattr__(power, name, 2.5)
    with pytest.raises(InputError, match=f"`{name}` must be a whole number, got 2.5"):
        power.__post_init__()


def test_particles_that_do_not_fit_are_refused():
    message = r"rows:1: `max_tokens` must hold 8 particles of 9 tokens .* of 7, 79 in all, got 78"
    with pytest.raises(InputError, match=message):
        draw_all(tiny(), ParticleFilter(particles=8), max_tokens=78)
