"""What comes with a Trainer: accumulation, mixed precision, checkpointing, LoRA."""

import pytest
import torch

from helpers.tiny import alone, tiny
from helpers.tiny_groups import COMPLETIONS, PROMPTS, bits, compared, fitted, likelihood, losses
from sharpen import Scorer
from sharpen.training.groups import Batch
from sharpen.training.losses import Likelihood, Square

# steps are as long as gradients: Adam would divide rounding by rounding
SGD = {"logging_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}


@pytest.fixture(scope="module")
def pairs():
    return compared()


def moved(model):
    return bits(model) - bits(tiny())


@pytest.mark.parametrize("max_tokens", [16384, 12])
def test_accumulated_batches_are_one_batch(tmp_path, pairs, max_tokens):
    """The loss is a mean over pairs, of which each batch here has as many."""
    asked = {"epochs": 1.0, "lr": 1e-3, "max_tokens": max_tokens}
    one = fitted(tmp_path / "one", pairs, Square(1.0), batch=6, more=SGD, **asked)
    more = SGD | {"gradient_accumulation_steps": 3}
    three = fitted(tmp_path / "three", pairs, Square(1.0), batch=2, more=more, **asked)
    assert moved(one).norm() > 1e-3
    assert (moved(three) - moved(one)).norm() < 1e-4 * moved(one).norm()
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def gradient(logprobs, objective, batch):
    model = tiny().train()
    objective(logprobs(model).float(), batch).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("max_tokens", [16384, 12])
def test_a_half_precision_gradient_is_as_good_as_that_of_pytorch(tmp_path, pairs, max_tokens):
    batch, objective = Batch.of(pairs), Square(1.0)

    def whole(model):
        return alone(model, PROMPTS, COMPLETIONS)

    def cast(model):
        with torch.autocast("cpu", torch.bfloat16):
            return alone(model, PROMPTS, COMPLETIONS)

    truth, low = (gradient(f, objective, batch) for f in (whole, cast))
    # a step that weights of 0.3 take in fp32 without much rounding
    lr = 1e-2
    model = fitted(
        tmp_path,
        pairs,
        objective,
        batch=6,
        epochs=1.0,
        lr=lr,
        max_tokens=max_tokens,
        more=SGD | {"bf16": True, "lr_scheduler_type": "constant"},
    )
    assert bits(model).dtype == torch.float32
    error, own = (moved(model) / -lr - truth).norm(), (low - truth).norm()
    assert own > 0.01 * truth.norm(), "autocast was off"
    assert 0.3 * own < error <= 1.5 * own


def test_half_precision_steps_agree_with_full_ones(tmp_path, pairs):
    sgd = {"lr": 3e-3}
    for max_tokens in (16384, 12):
        out = tmp_path / str(max_tokens)
        more = SGD | {"bf16": True, "max_grad_norm": 1.0}
        fitted(out, pairs, Square(1.0), max_tokens=max_tokens, more=more, **sgd)
    assert losses(tmp_path / "12") == pytest.approx(losses(tmp_path / "16384"), rel=0.2)
    fitted(tmp_path / "full", pairs, Square(1.0), more=SGD | {"max_grad_norm": 1.0}, **sgd)
    assert losses(tmp_path / "12") == pytest.approx(losses(tmp_path / "full"), rel=0.2)
    assert losses(tmp_path / "12") != losses(tmp_path / "full")


# renamed in transformers 5.23
of_transformers = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated")


class Calls:
    """How often a layer begins a forward in training; one that is computed again stops early."""

    def __init__(self, model):
        self.n = 0
        model.model.layers[0].mlp.register_forward_pre_hook(self)

    def __call__(self, layer, _):
        self.n += layer.training


@of_transformers
@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("max_tokens", [16384, 12])
def test_gradient_checkpointing_computes_again_and_changes_nothing(
    tmp_path, pairs, lora_rank, max_tokens
):
    asked = {"lora_rank": lora_rank, "max_tokens": max_tokens, "epochs": 1.0, "lr": 1e-3}
    plain, again = tiny(), tiny()
    calls = Calls(plain), Calls(again)
    fitted(tmp_path / "plain", pairs, Square(1.0), model=plain, more=SGD, **asked)
    more = SGD | {"gradient_checkpointing": True}
    fitted(tmp_path / "again", pairs, Square(1.0), model=again, more=more, **asked)
    # beside its own forward and backward, a bounded step has a forward for the slopes of the loss
    assert calls[1].n >= 1.5 * calls[0].n > 0
    assert moved(plain).norm() > 1e-4
    assert (moved(again) - moved(plain)).norm() < 1e-4 * moved(plain).norm()
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@of_transformers
def test_checkpointing_counts_what_no_cache_can_share(tmp_path):
    """A checkpointed forward returns no cache, so each sequence is read whole."""
    from helpers.families import family
    from sharpen.training.options import FitOptions, trainer_arguments
    from sharpen.training.trainer import GroupTrainer

    batch = Batch.of(likelihood())
    for is_checkpointed in (False, True):
        model = family("lfm2")
        more = {"gradient_checkpointing": is_checkpointed}
        args = trainer_arguments(FitOptions(more=more), tmp_path, is_cpu=True)
        trainer = GroupTrainer(model, likelihood(), Likelihood(), args)
        assert trainer.scorer.route.sharing == "cache"
        apart = sum(3 * len(prompt) for prompt in PROMPTS) + int(batch.offsets[-1])
        want = apart if is_checkpointed else batch.n_tokens
        assert trainer._graph_tokens(batch) == want


def test_adapters_begin_by_the_seed_alone(tmp_path, pairs):
    found = []
    for at, seed in enumerate((5, 5, 6)):
        model = tiny()
        torch.manual_seed(at)
        asked = {"lora_rank": 2, "epochs": 0.5, "seed": seed, "batch": 6}
        found.append(bits(fitted(tmp_path / str(at), pairs, Square(1.0), model=model, **asked)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    # nothing half saved is left
    left = sorted(p.name for p in (tmp_path / "0").iterdir())
    assert left == ["checkpoints", "losses.jsonl", "model"]


def test_adapters_have_the_rank_that_was_asked_for_and_end_in_the_weights(tmp_path, pairs):
    model = fitted(tmp_path, pairs, Square(1.0), lora_rank=2, lr=1e-2)
    start = dict(tiny().named_parameters())
    ranks = {
        name: torch.linalg.matrix_rank(weight.detach() - start[name].detach(), atol=1e-5).item()
        for name, weight in model.named_parameters()
        if weight.ndim == 2
    }
    adapted = {name: rank for name, rank in ranks.items() if "proj" in name}
    assert len(adapted) == 2 * 7
    assert set(adapted.values()) == {2}
    # embeddings, norms and the head stay
    others = set(start) - set(adapted)
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], start[name]) for name in others)
    assert "peft" not in type(model).__module__
    assert Scorer(model).route.sharing == "tree"
