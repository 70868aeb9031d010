"""Which route a model takes, and that the answer is right on either."""

import logging

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from helpers.tiny import FAMILIES, V, alone, opaque, ragged, tiny
from sharpen import Scorer
from sharpen.errors import InputError
from sharpen.scoring.model_access import Head, candidate_heads


def assert_scores_like_the_model(model, route):
    prompts, completions = ragged()
    scorer = Scorer(model, max_tokens=40)
    got = scorer.score(prompts, completions).tokens.logprob
    with torch.no_grad():
        want = alone(model, prompts, completions)
    assert scorer.route.head == route
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def scaled(model, factor):
    """`model` with logits that nothing but its code says are scaled."""
    inner = model.forward

    def forward(input_ids, attention_mask=None):
        out = inner(input_ids=input_ids, attention_mask=attention_mask)
        out.logits = out.logits * factor
        return out

    model.forward = forward
    return model


def hook_doubles(model):
    model.lm_head.register_forward_hook(lambda _module, _args, out: 2 * out)
    return model


def low_rank_head(model):
    """As an adapter on the head: a linear layer to the eye, with a forward of its own."""

    class Adapted(nn.Linear):
        def forward(self, input):  # noqa: A002 (the name in nn.Linear)
            return super().forward(input) + input.sum(dim=-1, keepdim=True) * self.get_buffer(
                "extra"
            )

    model.lm_head.__class__ = Adapted
    model.lm_head.register_buffer("extra", torch.linspace(-1, 1, V))
    return model


def extra_norm(model):
    """A model that normalises between backbone and head."""
    norm = nn.LayerNorm(model.config.hidden_size)
    model.lm_head.register_forward_pre_hook(lambda _module, args: norm(args[0]))
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (opaque, "its head is not one plain linear layer"),
        (lambda: hook_doubles(tiny()), "its head is not one plain linear layer"),
        (lambda: low_rank_head(tiny()), "its head is not one plain linear layer"),
        (lambda: extra_norm(tiny()), "its head is not one plain linear layer"),
        (lambda: scaled(tiny(), 0.5), "nats away from those of its head"),
        (lambda: scaled(tiny("gemma2-softcap"), 0.9), "nats away from those of its head"),
    ],
    ids=["opaque", "hook", "adapter", "norm", "scaled", "scaled-after-cap"],
)
def test_an_unknown_head_takes_the_logits_route_and_says_so_once(build, reason, caplog):
    with caplog.at_level(logging.WARNING, logger="sharpen"):
        assert_scores_like_the_model(build(), "logits")
    (record,) = caplog.records
    assert "takes the slower logits route" in record.message
    assert reason in record.message


def test_a_head_that_accelerate_has_placed_is_still_linear():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = tiny()
    add_hook_to_module(model.lm_head, ModelHook())
    assert "forward" in vars(model.lm_head)
    assert_scores_like_the_model(model, "hidden")


def test_hyperclova_multiplies_by_what_granite_divides_by():
    model = tiny("granite-divides")
    both = candidate_heads(model.config)
    assert {Head(4.0), Head(0.25), Head(1.0)} <= set(both)
    # a Granite that multiplies: 16 undoes the division and multiplies by 4
    assert_scores_like_the_model(scaled(model, 16.0), "hidden")


def test_a_scale_before_the_cap_is_one_of_the_readings():
    model = tiny("gemma2-softcap")
    model.config.output_multiplier = 0.5
    head = Head(temperature=2.0, softcap=6.0)
    assert head in candidate_heads(model.config)
    z = torch.linspace(-9, 9, 5)
    by_hand = 3 * torch.tanh(0.5 * z / 3)
    as_read = 6.0 * torch.tanh(z / 6.0) / 2.0
    torch.testing.assert_close(as_read, by_hand)


def test_nothing_known_means_the_plain_reading():
    assert candidate_heads(tiny().config) == [Head()]


def test_nan_in_some_weights_does_not_hide_the_route():
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[::10] = float("nan")
    assert Scorer(model).route.head == "hidden"


def test_nan_everywhere_takes_the_logits_route():
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert Scorer(model).route.head == "logits"


@pytest.fixture
def rough_products():
    """PyTorch allowed to round fp32 products to bf16, where the machine can."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_probe_allows_for_the_precision_that_products_are_set_to(rough_products):
    assert Scorer(tiny()).route.head == "hidden"


def test_probe_leaves_no_trace():
    model = tiny().train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    before = torch.random.get_rng_state()
    assert Scorer(model).route.head == "hidden"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_looks_ahead_is_refused():
    config = BertConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.3,
    )
    scorer = Scorer(BertLMHeadModel(config))
    with pytest.raises(InputError, match=r"`model` must be causal, got BertLMHeadModel"):
        scorer.score([[1, 2]], [[[3]]])


def leaky(family="llama", amount=0.1):
    """A model whose rows get a little of what the whole batch says; one alone is as it was."""
    model = tiny(family)

    def leak(module, args, out):
        return out + amount * out.mean(dim=(0, 1), keepdim=True) if len(out) > 1 else out

    model.get_input_embeddings().register_forward_hook(leak)
    return model


@pytest.mark.parametrize("sharing", ["auto", "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2-tied"])
def test_a_model_whose_rows_change_with_their_batch_reads_one_at_a_time(family, sharing, caplog):
    model = leaky(family)
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]
    completions = [[[20, 21], [22, 23, 24, 25]], [[30, 31, 32]]]
    with torch.no_grad():
        want = alone(model, prompts, completions)
    scorer = Scorer(model, sharing=sharing)
    with caplog.at_level(logging.WARNING):
        got = scorer.score(prompts, completions).tokens.logprob
        scorer.score(prompts, completions)
    assert scorer.route.sharing == "alone"
    assert caplog.text.count("reads one sequence at a time: a batch changes the log-probs") == 1
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    got = scorer.logprobs(prompts, completions)
    torch.testing.assert_close(got.detach(), want, atol=2e-5, rtol=0)
    got.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    scorer.backward(prompts, completions, lambda logprob_S: logprob_S.sum())
    bounded = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(bounded, gradients, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("sharing", ["tree", "cache"])
def test_a_model_whose_rows_change_with_their_batch_cannot_share(sharing):
    with pytest.raises(InputError, match="a batch changes the log-probs of its rows"):
        Scorer(leaky(), sharing=sharing).score([[5, 6]], [[[7], [8]]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_in_a_batch_is_no_leak(family, dtype):
    assert Scorer(tiny(family).to(dtype)).route.sharing != "alone"
