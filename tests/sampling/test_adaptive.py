import hashlib
import math

import pytest

from sharpen import Scores
from sharpen.errors import InputError
from sharpen.models import load_model, load_tokenizer
from sharpen.sampling import Prompt, Samples, SamplingConfig
from sharpen.sampling.adaptive import sample_adaptively
from sharpen.sampling.hf import TransformersSampler
from sharpen.selection import adaptive_best_of_n
from sharpen.tasks import get_task

# most probable output first, from easy to hard prompts
LAWS = [[0.9, 0.1], [0.5, 0.3, 0.2], [0.2] + [0.1] * 8, [0.04] + [0.96 / 40] * 40]
N_EACH = 60


class TableSampler:
    """Draws outputs 0, 1, ... from a table; a draw depends on prompt, seed and sample index."""

    def __init__(self):
        self.asked = []

    def sample(self, prompts, config, *, done=()):
        self.asked.append((len(prompts), config.first, config.n))
        for prompt in prompts:
            law = LAWS[prompt.ids[0]]
            drawn = [
                self.draw(law, f"{config.seed} {prompt.id} {config.first + i}")
                for i in range(config.n)
            ]
            yield [
                Samples(
                    prompt.id,
                    [str(y) for y in drawn],
                    [[y] for y in drawn],
                    [[math.log(law[y])] for y in drawn],
                    ["stop"] * config.n,
                )
            ]

    def draw(self, law, name):
        u = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64
        for y, p in enumerate(law):
            u -= p
            if u < 0:
                return y
        return len(law) - 1


def table_prompts():
    return [
        Prompt(f"{law}.{i}", "", (law,), "table") for law in range(len(LAWS)) for i in range(N_EACH)
    ]


@pytest.mark.parametrize("delta", [0.5, 0.2, 0.05])
def test_measured_miss_rate_is_at_most_delta_and_the_cost_below_a_fixed_n(delta):
    prompts = table_prompts()
    found = sample_adaptively(TableSampler(), prompts, SamplingConfig(n=5000), delta=delta)
    assert found.choice.certified_fraction == 1
    picks = zip(found.samples, found.choice.chosen.tolist(), strict=True)
    missed = [samples.completions[g] != "0" for samples, g in picks]
    for law in range(len(LAWS)):
        assert sum(missed[law * N_EACH : (law + 1) * N_EACH]) <= delta * N_EACH
    assert any(missed) or delta < 0.5
    # the N that draws the hardest prompt's best output with probability 1 - delta
    fixed = math.ceil(math.log(delta) / math.log(1 - 0.04))
    assert found.n_drawn < fixed * len(prompts)
    used = int(found.choice.n_used.sum())
    assert used <= found.n_drawn <= used + 7 * len(prompts)


def test_the_choice_does_not_depend_on_the_rounds_and_is_that_of_drawing_all_at_once():
    prompts, cap = table_prompts()[::6], 60
    (whole,) = zip(*TableSampler().sample(prompts, SamplingConfig(n=cap, seed=3)), strict=True)
    scores = Scores.from_logprobs([samples.logprobs for samples in whole])
    want = adaptive_best_of_n(scores, delta=0.1, cap=cap)
    assert 0 < want.certified_fraction < 1
    for round_size in (1, 8, 64):
        found = sample_adaptively(
            TableSampler(), prompts, SamplingConfig(n=cap, seed=3), delta=0.1, round_size=round_size
        )
        assert [x.tolist() for x in found.choice] == [x.tolist() for x in want]
        for samples, every in zip(found.samples, whole, strict=True):
            n = len(samples.completions)
            assert samples.completion_ids == every.completion_ids[:n]
            assert samples.logprobs == every.logprobs[:n]
        if round_size == 1:
            assert found.n_drawn == int(want.n_used.sum())


def test_rounds_draw_new_indices_of_open_prompts_up_to_what_is_wanted():
    sampler = TableSampler()
    found = sample_adaptively(sampler, table_prompts(), SamplingConfig(n=30, first=5), delta=0.2)
    counts, firsts, sizes = zip(*sampler.asked, strict=True)
    assert firsts == tuple(5 + sum(sizes[:i]) for i in range(len(sizes)))
    assert sum(sizes) == 30
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[0] == 4 * N_EACH > counts[-1] > 0
    assert max(len(samples.completions) for samples in found.samples) == 30


@pytest.fixture(scope="module")
def game24():
    return TransformersSampler(load_model("game24", device="cpu"), load_tokenizer("game24"))


def puzzles(n):
    task = get_task("game24")
    tokenizer = load_tokenizer("game24")
    for example in task.examples("test")[:n]:
        text = task.prompt(example)
        yield Prompt(example.id, text, tuple(tokenizer(text)["input_ids"]), example.id)


def test_the_shipped_model_stops_where_all_its_samples_say(game24):
    prompts = list(puzzles(6))
    config = SamplingConfig(n=8, max_new_tokens=40)
    found = sample_adaptively(game24, prompts, config, delta=0.5, round_size=3)
    whole = {s.prompt_id: s for batch in game24.sample(prompts, config) for s in batch}
    ordered = [whole[prompt.id] for prompt in prompts]
    for samples, every in zip(found.samples, ordered, strict=True):
        n = len(samples.completions)
        assert samples.completion_ids == every.completion_ids[:n]
    finished = [[reason == "stop" for reason in s.finish_reasons] for s in ordered]
    scores = Scores.from_logprobs([s.logprobs for s in ordered], finished)
    want = adaptive_best_of_n(scores, delta=0.5)
    assert [x.tolist() for x in found.choice] == [x.tolist() for x in want]
    assert 0 < want.certified_fraction < 1
    assert found.n_drawn < 6 * 8


def test_first_shifts_the_samples(game24):
    prompts = list(puzzles(2))

    def ids(**options):
        batches = game24.sample(prompts, SamplingConfig(max_new_tokens=40, **options))
        return {s.prompt_id: s.completion_ids for batch in batches for s in batch}

    whole, part = ids(n=7), ids(n=3, first=4)
    assert part == {name: drawn[4:] for name, drawn in whole.items()}


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"temperature": 0.7}, {}, r"`temperature` and `top_p` must be 1, .* got 0.7 and 1.0"),
        ({"top_p": 0.9}, {}, r"`temperature` and `top_p` must be 1, .* got 1.0 and 0.9"),
        ({}, {"delta": 1.0}, r"`delta` must be in \(0, 1\), got 1.0"),
        ({}, {"round_size": 0}, r"`round_size` must be at least 1, got 0"),
        ({"first": -1}, {}, r"`first` must be at least 0, got -1"),
    ],
)
def test_bad_settings_are_refused(config, options, message):
    with pytest.raises(InputError, match=message):
        sample_adaptively(TableSampler(), table_prompts(), SamplingConfig(**config), **options)


def test_bad_settings_are_refused_of_no_prompts_too():
    def nothing(**options):
        return sample_adaptively(TableSampler(), [], SamplingConfig(), **options)

    assert nothing().samples == []
    with pytest.raises(InputError, match=r"`delta` must be in \(0, 1\), got 5"):
        nothing(delta=5.0)
