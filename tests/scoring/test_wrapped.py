"""Adapters, autocast and torch.compile around a model: shared prompts give what it gives alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.families import family
from helpers.tiny import V, alone
from sharpen import Scorer

NAMES = {"llama": "tree", "lfm2": "cache"}
of_peft = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated")


def ids(n, seed):
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


OPENING = ids(9, 3)
PROMPTS = [ids(30, 0), ids(20, 1)]
COMPLETIONS = [[OPENING + ids(n, n) for n in (4, 9, 1)], [ids(5, 7), ids(8, 9)]]


def loss(logprob):
    return (logprob * torch.linspace(-1, 2, len(logprob))).square().mean()


def gradient(model):
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(found)


def adapted(name, targets):
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, r=4, init_lora_weights=False
    )  # both factors random: an adapter that does nothing proves nothing
    return get_peft_model(family(name), config).eval()


@of_peft
@pytest.mark.parametrize("head", ["hidden", "logits"])
@pytest.mark.parametrize("name", NAMES)
def test_adapters_share_as_their_model_does_on_and_off(name, head):
    targets = [{"llama": "q_proj", "lfm2": "in_proj"}[name], "v_proj"]
    model = adapted(name, targets + (["lm_head"] if head == "logits" else []))
    scorer = Scorer(model)
    assert scorer.route == (NAMES[name], head)
    on = scorer.score(PROMPTS, COMPLETIONS).tokens.logprob
    with torch.no_grad():
        torch.testing.assert_close(on, alone(model, PROMPTS, COMPLETIONS), atol=2e-5, rtol=0)
    with model.disable_adapter(), torch.no_grad():
        off = scorer.score(PROMPTS, COMPLETIONS).tokens.logprob
        torch.testing.assert_close(off, alone(model, PROMPTS, COMPLETIONS), atol=2e-5, rtol=0)
    assert (on - off).abs().max() > 0.1
    loss(alone(model, PROMPTS, COMPLETIONS)).backward()
    want = gradient(model)
    loss(scorer.logprobs(PROMPTS, COMPLETIONS)).backward()
    assert (gradient(model) - want).norm() <= 1e-5 * want.norm()
    scorer.backward(PROMPTS, COMPLETIONS, loss)
    assert (gradient(model) - want).norm() <= 1e-5 * want.norm()


@of_peft
@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_under_gradient_checkpointing(reentrant):
    model = adapted("llama", ["q_proj", "v_proj"])
    loss(alone(model, PROMPTS, COMPLETIONS)).backward()
    want = gradient(model)
    scorer = Scorer(model)
    assert scorer.route.sharing == "tree"
    checkpointed(model, reentrant)
    seen = tokens_read(model)
    loss(scorer.logprobs(PROMPTS, COMPLETIONS)).backward()
    assert (gradient(model) - want).norm() <= 1e-5 * want.norm()
    # the row of both prompts and their completions, once; no whole sequences
    assert seen == [30 + 9 + 3 + 8 + 0 + 20 + 4 + 7]


def checkpointed(model, reentrant):
    model.train()
    # renamed in transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()


def tokens_read(model):
    """How many tokens each forward reads, as it goes."""
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _out: seen.append(args[0].numel())
    )
    return seen


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", [*NAMES, "gemma2", "gpt2"])
def test_autocast_costs_what_it_costs_alone(name, inside):
    """Whether the probe runs under autocast or not, the way found is that of fp32."""
    model = family(name)
    with torch.no_grad():
        truth = alone(model, PROMPTS, COMPLETIONS)
    scorer = Scorer(model)
    if not inside:
        assert scorer.route.sharing == NAMES.get(name, "tree")
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            low = alone(model, PROMPTS, COMPLETIONS).float()
        assert scorer.route.sharing == NAMES.get(name, "tree")
        got = scorer.logprobs(PROMPTS, COMPLETIONS)
        loss(got).backward()
    assert gradient(model).isfinite().all()
    error, own = ((x - truth).abs().mean() for x in (got.detach(), low))
    assert own > 1e-3, "autocast was off"
    assert error <= 1.5 * own


def whole(model):
    model.compile(backend="eager")


def backbone(model):
    model.model.compile(backend="eager")
    model(torch.tensor(PROMPTS[:1]))  # its graph is there, of a forward without a tree


def layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")


@pytest.mark.parametrize(
    ("compiled", "checkpoint"), [(whole, False), (backbone, False), (layers, False), (layers, True)]
)
def test_what_is_compiled_shares_too(compiled, checkpoint):
    model = family("llama")
    loss(alone(model, PROMPTS, COMPLETIONS)).backward()
    want = gradient(model)
    scorer = Scorer(model)
    assert scorer.route.sharing == "tree"
    compiled(model)
    if checkpoint:
        checkpointed(model, False)
    loss(scorer.logprobs(PROMPTS, COMPLETIONS)).backward()
    assert (gradient(model) - want).norm() <= 1e-5 * want.norm()


def test_a_compiled_model_is_probed_and_stays_one_graph():
    model = family("llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    scorer = Scorer(compiled)
    assert scorer.route.sharing == "tree"
    with torch.no_grad():
        want = alone(model, PROMPTS, COMPLETIONS)
        got = scorer.score(PROMPTS, COMPLETIONS).tokens.logprob
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        prompt = torch.tensor(PROMPTS[:1])
        torch.testing.assert_close(compiled(prompt).logits, model(prompt).logits)
