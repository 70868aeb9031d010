"""What is relied on of the installed TRL: names, signatures, and its operations' numbers."""

import inspect
import subprocess
import sys

import pytest
import torch
import trl
from trl.trainer import add_fused_lm_head
from trl.trainer import utils as theirs

from helpers.trl_tiny import batch, online, saved
from sharpen.errors import InputError
from sharpen.integrations import trl as ours

# of TRL's own configuration
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
OPS = ("selective_log_softmax", "selective_log_softmax_and_entropy", "entropy_from_logits")


def parameters(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", OPS)
def test_operations_have_the_signatures_of_trl(name):
    assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name))


def test_the_head_has_the_signature_of_trl_and_one_option_more():
    assert parameters(ours.add_fused_lm_head)[:-1] == parameters(add_fused_lm_head)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_what_is_overridden_is_there_and_is_called_so(kind):
    own = getattr(trl, f"{kind}Trainer")._get_per_token_logps_and_entropies
    names = list(inspect.signature(own).parameters)
    assert names[:6] == [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
    ]


@pytest.mark.parametrize(
    ("method", "got"),
    [
        (None, "got none in TRL"),
        (lambda self, model, ids, mask, keep: None, "got one that takes model, ids, mask, keep in"),
    ],
    ids=["gone", "changed"],
)
def test_a_trl_that_changed_the_method_is_named(method, got, monkeypatch, tmp_path):
    name = "_get_per_token_logps_and_entropies"
    if method is None:
        monkeypatch.delattr(trl.RLOOTrainer, name)
    else:
        monkeypatch.setattr(trl.RLOOTrainer, name, method)
    with pytest.raises(InputError, match=rf"needs TRL's method {name}\(model, .*{got}") as told:
        online("RLOO", saved(tmp_path), tmp_path, shared=True)
    assert trl.__version__ in str(told.value)


def test_a_trl_that_asks_no_head_is_named_and_not_silently_its_own(monkeypatch, tmp_path):
    trainer = online("GRPO", saved(tmp_path), tmp_path, shared=True, max_steps=1)
    # a loss of the plain logits, as a later TRL may have it
    monkeypatch.setattr(
        trl.GRPOTrainer, "compute_loss", lambda self, model, *_, **__: model.lm_head.weight.sum()
    )
    with pytest.raises(InputError, match="`fused_lm_head=True`, got TRL") as told:
        trainer.train()
    assert trl.__version__ in str(told.value)


@pytest.mark.parametrize("shape", [(6,), (2, 5)], ids=str)
@pytest.mark.parametrize("T", [1.0, 0.7])
def test_operations_have_the_numbers_of_trl(shape, T):
    logits, index = 3 * torch.randn(*shape, 500), torch.randint(500, shape)
    row_mask = torch.rand(shape) > 0.3
    found = []
    for module in (ours, theirs):
        leaf = logits.clone().requires_grad_()
        logprob, entropy = module.selective_log_softmax_and_entropy(
            leaf, index, temperature=T, row_mask=row_mask
        )
        alone = module.selective_log_softmax(leaf, index, T, row_mask)
        again = module.entropy_from_logits(leaf)
        weight = torch.linspace(-1, 2, logprob.numel()).view(shape)
        loss = ((logprob + 2 * entropy - alone * 3 + again) * weight).sum()
        values = (x.detach() for x in (logprob, entropy, alone, again))
        found.append((*values, torch.autograd.grad(loss, leaf)[0]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("K", [1, 4])
def test_several_ids_a_row_as_trl_does(K):
    logits, index = torch.randn(2, 3, 50), torch.randint(50, (2, 3, K))
    want = theirs.selective_log_softmax(logits, index)
    torch.testing.assert_close(ours.selective_log_softmax(logits, index), want)


def test_the_head_returns_every_field_of_trl(tmp_path):
    from sharpen.models import load_model

    folder, (ids, mask, C) = saved(tmp_path), batch()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-C] = -100
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    found = []
    for add in (add_fused_lm_head, ours.add_fused_lm_head):
        model = load_model(folder, device="cpu")
        add(model, temperature=0.8, outputs=outputs)
        with torch.no_grad():
            found.append(
                model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            )
    want, got = found
    assert type(got) is type(want)
    for name in (*outputs, "label_mask", "loss"):
        if want[name].dtype == torch.bool:
            assert torch.equal(got[name], want[name]), name
        else:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=2e-5)
    assert got.aux_loss is None


def test_importing_the_package_does_not_import_trl():
    code = """
import sys
import sharpen.integrations.trl as ours
assert "trl" not in sys.modules and "datasets" not in sys.modules
import trl
assert ours is not trl and trl.__file__ != ours.__file__
assert ours.SharedPrefixGRPOTrainer.__mro__[3] is trl.GRPOTrainer
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
