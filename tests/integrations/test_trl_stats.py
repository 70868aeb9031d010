"""Outputs of the shared head: right beside each row alone, with gradients, on any route."""

import copy
import logging

import pytest
import torch

from helpers.tiny import V, opaque, tiny
from sharpen.errors import InputError
from sharpen.integrations.trl.shared_stats import NEEDS, SharedStats

P, C = 20, 8


def batch():
    """Two prompts, three completions each, padded on both sides; the third row scores nothing."""
    generator = torch.Generator().manual_seed(3)
    rows, mask, asked = [], [], []
    for i, (p, c) in enumerate([(20, 8), (20, 3), (20, 5), (13, 8), (13, 1), (13, 6)]):
        prompt = torch.randint(V, (p,), generator=torch.Generator().manual_seed(i // 3)).tolist()
        completion = torch.randint(V, (c,), generator=generator).tolist()
        before, after = P - p, C - c
        rows.append([0] * before + prompt + completion + [0] * after)
        mask.append([0] * before + [1] * (p + c) + [0] * after)
        asked.append([0] * P + [int(i != 2)] * c + [0] * after)
    ids, mask, asked = map(torch.tensor, (rows, mask, asked))
    return ids, mask, ids.masked_fill(asked == 0, -100)


def alone(model, ids, mask, labels, T):
    """Every output by the model's own logits, a row at a time, in the model's dtype."""
    found = {name: [] for name in NEEDS}
    for row, real, label in zip(ids, mask.bool(), labels, strict=True):
        z = torch.zeros(len(row), V, dtype=next(model.parameters()).dtype)
        z[real] = model(row[real][None]).logits[0] / T
        log_p = z[:-1].log_softmax(1)
        target = label[1:].clamp(min=0)[:, None]
        asked = label[1:] != -100
        every = {
            "log_probs": log_p.gather(1, target)[:, 0],
            "entropy": -(log_p.exp() * log_p).sum(1),
            "log_sum_sq_probs": (2 * log_p).logsumexp(1),
            "mean_logits": z[:-1].mean(1),
            "is_top1": z[:-1].argmax(1) == target[:, 0],
        }
        for name, x in every.items():
            found[name].append(x.masked_fill(~asked, 0))
    return {name: torch.stack(rows) for name, rows in found.items()}


def step(model, outputs):
    """Gradients of fixed sums of log-probs and entropies."""
    generator = torch.Generator().manual_seed(5)
    shape = outputs["log_probs"].shape
    w, u = (torch.randn(shape, generator=generator) for _ in range(2))
    loss = (outputs["log_probs"] * w + outputs["entropy"] * u).sum()
    return torch.autograd.grad(loss, list(model.parameters()))


def learned():
    """Learned positions: those of the row without its padding."""
    return tiny("gpt2-tied")


@pytest.mark.parametrize("T", [1.0, 0.6])
@pytest.mark.parametrize("make", [tiny, opaque, learned], ids=["hidden", "logits", "positions"])
def test_each_output_is_that_of_a_row_alone(make, T):
    model = make()
    ids, mask, labels = batch()
    stats = SharedStats(model, temperature=T, outputs=tuple(NEEDS))
    assert stats.route[0].sharing == "tree"
    got, want = stats(ids, mask, labels), alone(model, ids, mask, labels, T)
    truth = alone(copy.deepcopy(model).double(), ids, mask, labels, T)
    for name in NEEDS:
        if name == "is_top1":
            assert torch.equal(got[name], truth[name])
            continue
        theirs = (want[name].double() - truth[name]).abs().max().item()
        ours = (got[name].double() - truth[name]).abs().max().item()
        assert ours <= 2 * theirs + 2e-6, name


@pytest.mark.parametrize("make", [tiny, opaque], ids=["hidden", "logits"])
def test_gradients_are_those_of_each_row_alone(make):
    model = make()
    ids, mask, labels = batch()
    got = step(model, SharedStats(model, temperature=0.8, outputs=("entropy",))(ids, mask, labels))
    want = step(model, alone(model, ids, mask, labels, 0.8))
    double = copy.deepcopy(model).double()
    truth = step(double, alone(double, ids, mask, labels, 0.8))
    for a, b, c in zip(got, want, truth, strict=True):
        theirs, ours = (b.double() - c).norm(), (a.double() - c).norm()
        assert ours <= 4 * theirs + 1e-6 * c.norm()


@pytest.mark.parametrize("max_tokens", [30, 60])
def test_a_small_budget_changes_no_number(max_tokens):
    model = tiny()
    parts = SharedStats(model, max_tokens=max_tokens)(*batch())["log_probs"]
    whole = SharedStats(model)(*batch())["log_probs"]
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-5)


def test_a_batch_without_a_label_has_gradients_of_zero():
    model = tiny()
    ids, mask, labels = batch()
    found = SharedStats(model, outputs=("entropy",))(ids, mask, torch.full_like(labels, -100))
    assert found["log_probs"].eq(0).all()
    found["log_probs"].sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in model.parameters())


def test_a_prompt_is_read_once(monkeypatch):
    model = tiny()
    stats = SharedStats(model)
    read = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    ids, mask, labels = batch()
    stats(ids, mask, labels)
    # both prompts once, completions without their last token; the row of no label is not read
    assert read == [20 + 13 + (8 - 1) + (3 - 1) + (8 - 1) + (1 - 1) + (6 - 1)]


def test_dropout_in_attention_takes_whole_sequences_and_says_so(caplog):
    model = tiny(attention_dropout=0.5).train()
    with caplog.at_level(logging.WARNING, logger="sharpen"):
        SharedStats(model)(*batch())
    assert "whole sequences instead of shared prompts" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": ("logits",)}, "`outputs` must be of log_probs, entropy"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"max_tokens": 0}, "must be above 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        SharedStats(tiny(), **options)


def test_mean_logits_are_over_the_columns_of_the_head():
    model = tiny("llama")
    narrow = model.get_input_embeddings().weight
    wide = torch.nn.Embedding(V + 64, narrow.shape[1])
    with torch.no_grad():
        wide.weight[:V] = narrow
    model.model.embed_tokens = wide
    ids, mask, labels = batch()
    with torch.no_grad():
        want = alone(model, ids, mask, labels, 1.0)["mean_logits"]
        got = SharedStats(model, outputs=("mean_logits",))(ids, mask, labels)["mean_logits"]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
