"""Mixed precision, as a Trainer runs it: no less exact than the model's own."""

import pytest
import torch

from helpers.tiny import alone, ragged, tiny
from sharpen import Scorer


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap", "gpt2-tied", "gptj-bias"])
def test_autocast_scores_at_least_as_exactly_as_whole_sequences(name):
    model = tiny(name)
    scorer = Scorer(model)
    assert scorer.route.sharing in ("tree", "cache")
    prompts, completions = ragged()
    want = scorer.logprobs(prompts, completions).detach()
    with torch.autocast("cpu", torch.bfloat16):
        plain = alone(model, prompts, completions).detach().float()
        got = scorer.logprobs(prompts, completions)
    assert got.dtype == torch.float32
    got.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert 0 < (got - want).abs().max() <= 1.5 * (plain - want).abs().max()
