"""Micro-batches that call every module once: the log-probs of each sequence alone."""

from collections import Counter

import pytest
import torch
from torch import nn

from helpers.families import family
from helpers.tiny import FAMILIES, alone, opaque, ragged, tiny
from sharpen import Scorer
from sharpen.errors import InputError
from sharpen.scoring import model_access
from sharpen.scoring.gradients import UniformMicroBatches
from sharpen.scoring.model_access import forward_is
from sharpen.scoring.packing import PackedRow
from sharpen.scoring.probe import probe_model

CPU = torch.device("cpu")
# those that no packed row scores right
WHOLE = ("gptj-bias", "lfm2")


def lockstep(model, max_tokens=16384):
    return UniformMicroBatches(model, *probe_model(model, "auto"), max_tokens)


def model_of(name):
    return {"opaque": opaque, "lfm2": lambda: family("lfm2")}.get(name, lambda: tiny(name))()


def logprobs(steps, prompts, completions):
    """All log-probs in input order, and what each micro-batch called."""
    parts = steps.micro_batches(prompts, completions)
    found = torch.zeros(sum(len(part.target) for part in parts))
    calls = []
    for part in parts:
        calls.append(Counter())
        handles = [
            module.register_forward_hook(lambda m, *_, name=name: calls[-1].update([name]))
            for name, module in steps.model.named_modules()
            if name and any(True for _ in module.parameters())
        ]
        found[part.output_index] = steps.logprob(part, CPU).float()
        for handle in handles:
            handle.remove()
    return found, calls


@pytest.mark.parametrize("name", [*FAMILIES, "opaque", "lfm2"])
@pytest.mark.parametrize("max_tokens", [16384, 24])
def test_every_module_is_called_once_in_each_micro_batch(name, max_tokens):
    model = model_of(name)
    given = ragged()
    want = alone(model, *given)
    steps = lockstep(model, max_tokens)
    parts = steps.micro_batches(*given)
    assert (len(parts) == 1) == (max_tokens > 1000)
    assert all(isinstance(part, PackedRow) for part in parts) == (name not in WHOLE)
    with torch.no_grad():
        got, calls = logprobs(steps, *given)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    # a model that is called whole, to make its own logits, counts its parts like the others
    assert all(set(called.values()) == {1} for called in calls)
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    assert all(called == calls[0] and called[head] == 1 for called in calls)


def test_gradients_are_those_of_the_scorer():
    prompts, completions = ragged()
    want, got = tiny(), tiny()
    slope = torch.linspace(-1, 2, sum(len(ids) for group in completions for ids in group))
    (Scorer(want).logprobs(prompts, completions) * slope).sum().backward()
    steps = lockstep(got, 24)
    for part in steps.micro_batches(prompts, completions):
        (steps.logprob(part, CPU) * slope[part.output_index]).sum().backward()
    for ours, theirs in zip(got.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_logits_are_made_of_few_tokens_at_a_time(monkeypatch):
    monkeypatch.setattr(model_access, "LOGITS_BYTES", 4 * 293 * 24)
    given = ragged()
    assert len(lockstep(opaque()).micro_batches(*given)) > 1
    # a head that is read needs no logits
    assert len(lockstep(tiny()).micro_batches(*given)) == 1


def test_what_shares_nothing_goes_whole():
    steps = lockstep(tiny())
    (part,) = steps.micro_batches([[5, 6], [7]], [[[8, 9]], [[10]]])
    assert not isinstance(part, PackedRow)
    assert len(steps.filler([5, 6]).target) == 1


def test_modes_that_cannot_share_are_refused():
    model = tiny(attention_dropout=0.5)
    steps = lockstep(model)
    model.train()
    (part,) = steps.micro_batches(*ragged())
    with pytest.raises(InputError, match=r"cannot be shared in this mode: .* set every dropout"):
        steps.logprob(part, CPU)


def test_tokens_that_a_model_cannot_read_are_refused():
    with pytest.raises(InputError, match="token ids must be in"):
        lockstep(tiny()).micro_batches([[5]], [[[293]]])


@pytest.mark.parametrize("has_own", [False, True])
def test_a_forward_is_replaced_between_the_hooks_of_its_module(has_own):
    module, seen = nn.Linear(2, 2), []
    module.register_forward_hook(lambda m, given, out: seen.append(out))
    if has_own:
        module.forward = lambda x: "own"
    before = vars(module).get("forward")
    with pytest.raises(ZeroDivisionError), forward_is(module, lambda x: 1 / x):
        assert [module(1), module(0)] == [1]
    assert seen == [1]
    assert vars(module).get("forward") is before
