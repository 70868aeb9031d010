"""Nothing as large as the logits of all scored tokens is ever allocated."""

import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from helpers.tiny import alone, opaque, tiny
from sharpen import Scorer
from sharpen.scoring import model_access, token_stats

V = 20_000
PROMPTS = [[1, 2, 3]]
N, LENGTH = 24, 50
COMPLETIONS = [[[5] * LENGTH] * N]
LOGITS_BYTES = 4 * V * N * LENGTH  # 92 MiB


def largest_allocation(function) -> int:
    """Bytes of the largest single allocation while `function` runs, inside custom ops too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    return max(event.self_cpu_memory_usage for event in record.events() or [])


def test_the_instrument_sees_the_logits_of_one_sequence():
    model = tiny(vocab_size=V)
    with torch.no_grad():
        seen = largest_allocation(lambda: alone(model, PROMPTS, COMPLETIONS))
    assert seen >= LOGITS_BYTES / N


@pytest.mark.parametrize("stats", [("logprob",), ("entropy", "self_certainty", "is_greedy")])
def test_hidden_route_never_holds_logits(stats):
    scorer = Scorer(tiny(vocab_size=V))
    assert scorer.route.head == "hidden"
    seen = largest_allocation(lambda: scorer.score(PROMPTS, COMPLETIONS, stats=stats))
    assert seen < LOGITS_BYTES / 10


def test_nor_does_its_backward():
    scorer = Scorer(tiny(vocab_size=V))
    assert scorer.route.head == "hidden"
    seen = largest_allocation(lambda: scorer.logprobs(PROMPTS, COMPLETIONS).sum().backward())
    assert seen < LOGITS_BYTES / 10


@pytest.mark.parametrize("slopes", [True, False])
def test_nor_does_a_backward_in_bounded_memory(slopes):
    scorer = Scorer(tiny(vocab_size=V))
    loss = torch.ones(N * LENGTH) if slopes else lambda logprob: logprob.square().sum()
    seen = largest_allocation(lambda: scorer.backward(PROMPTS, COMPLETIONS, loss))
    assert seen < LOGITS_BYTES / 10


def test_logits_route_holds_those_of_one_small_batch(monkeypatch):
    scorer = Scorer(opaque(vocab_size=V))
    assert scorer.route.head == "logits"
    monkeypatch.setattr(model_access, "LOGITS_BYTES", LOGITS_BYTES // 5)
    seen = largest_allocation(lambda: scorer.score(PROMPTS, COMPLETIONS))
    assert seen <= LOGITS_BYTES / 5


def test_a_prompt_is_forgotten_before_whole_sequences_are_read(monkeypatch):
    """Its cache would stand beside every padded batch that follows."""
    caches, alive = [], []
    read, predict = token_stats.read_prompt, token_stats.HiddenPath.predict

    def remembered(*args):
        cache, last = read(*args)
        caches.append(weakref.ref(cache))
        return cache, last

    def watched(path, batch):
        alive.extend(cache() is not None for cache in caches)
        return predict(path, batch)

    scorer = Scorer(tiny(), sharing="cache")
    assert scorer.route.sharing == "cache"
    monkeypatch.setattr(token_stats, "read_prompt", remembered)
    monkeypatch.setattr(token_stats.HiddenPath, "predict", watched)
    # one prompt is shared, the other has nothing to share
    scorer.score([list(range(1, 40)), [7, 8]], [[[3, 4], [5]], [[6, 7]]])
    assert alive == [False]
