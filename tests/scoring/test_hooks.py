"""The hooks stay in a model: what it did before it still does, and a tree only where one is."""

import threading

import pytest
import torch

from helpers.families import CONTEXT, V, family
from sharpen import Scorer
from sharpen.scoring.hooks import (
    NAMES,
    SharingError,
    TreeMask,
    TreePlan,
    install,
    under,
    uninstall,
    window_of,
)
from sharpen.scoring.packing import plan
from sharpen.scoring.token_stats import hidden_rows
from sharpen_kernels.tree import Tree

PROMPT = torch.randint(V, (1, 20), generator=torch.Generator().manual_seed(0))
PAIRS = [(PROMPT[0].tolist(), [3, 5, 7, n]) for n in (1, 2, 4)]


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    model = family("llama")
    model.set_attn_implementation(request.param)
    return model


def test_generation_and_logits_are_what_they_were(model):
    with torch.no_grad():
        logits, tokens = model(PROMPT).logits, model.generate(PROMPT, max_new_tokens=8)
        assert install(model) is None
        assert install(model) is None  # twice is once
        assert torch.equal(model(PROMPT).logits, logits)
        assert torch.equal(model.generate(PROMPT, max_new_tokens=8), tokens)


def test_uninstall_gives_back_what_was_there(model):
    before = model.config._attn_implementation
    install(model)
    assert model.config._attn_implementation == NAMES[before]
    uninstall(model)
    assert model.config._attn_implementation == before


def test_a_padded_batch_next_to_a_tree(model):
    install(model)
    (row,) = plan(PAIRS, 1000)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, 15:] = 0
    with torch.no_grad():
        want = model(PROMPT.expand(2, -1), attention_mask=mask).logits
        with_tree = hidden_rows(model, row)
        assert torch.equal(model(PROMPT.expand(2, -1), attention_mask=mask).logits, want)
        assert torch.equal(hidden_rows(model, row), with_tree)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_finds_its_tree_again(model, reentrant):
    scorer = Scorer(model)
    assert scorer.route.sharing == "tree"

    def gradient():
        loss = scorer.logprobs([PAIRS[0][0]], [[c for _, c in PAIRS]]).sum()
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    want = gradient()
    model.train()
    # renamed in transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    loss = scorer.logprobs([PAIRS[0][0]], [[c for _, c in PAIRS]]).sum()
    loss.backward()
    for parameter, grad in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_another_thread_sees_no_tree(model):
    install(model)
    tree = Tree.chain([20])
    found = []
    with under(TreePlan(tree)), torch.no_grad():
        thread = threading.Thread(target=lambda: found.append(model(PROMPT).logits))
        thread.start()
        thread.join()
    with torch.no_grad():
        assert torch.equal(found[0], model(PROMPT).logits)


def test_dropout_in_training_takes_whole_sequences(caplog):
    model = family("llama", attention_dropout=0.5)
    scorer = Scorer(model)
    assert scorer.route.sharing == "tree"
    model.train()
    scorer.logprobs([PAIRS[0][0]], [[c for _, c in PAIRS]])
    assert "attention dropout is on" in caplog.text


@pytest.mark.parametrize("window", [1, 3, 7])
def test_windows_are_read_off_the_mask(window):
    def sliding(_batch, _head, query, key):
        return (key <= query) & (key > query - window)

    assert window_of(sliding, 7, 7, 7) == (None if window == 7 else window)


def test_other_masks_are_refused():
    def chunked(_batch, _head, query, key):
        return (key <= query) & (key // 3 == query // 3)

    def everything(_batch, _head, query, key):
        return key >= 0

    for mask in (chunked, everything):
        with pytest.raises(SharingError, match="neither causal nor a sliding window"):
            window_of(mask, 7, 7, 7)
    with pytest.raises(SharingError, match="attends from 1 to 7 of 7 tokens"):
        window_of(chunked, 1, 7, 7)


def test_the_tree_travels_as_the_mask():
    model = family("gemma3_text")
    install(model)
    seen = []
    layers = [layer.self_attn for layer in model.model.layers]
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda _m, _args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    (row,) = plan(PAIRS, CONTEXT)
    with torch.no_grad():
        hidden_rows(model, row)
    assert [type(mask) for mask in seen] == [TreeMask, TreeMask]
    assert [mask.window for mask in seen] == [5, None]
