"""Training steps: what is fitted rises, memory stays within the budget, a kill changes no bit."""

import os

import pytest
import torch
from transformers import TrainerCallback

from helpers.tiny import tiny
from helpers.tiny_groups import bits, fitted, losses, options, sums
from helpers.tiny_groups import compared as compared_groups
from helpers.tiny_groups import likelihood as likelihood_groups
from sharpen import Scorer
from sharpen.errors import InputError, TrainingError
from sharpen.models import load_model
from sharpen.training import fit as fit_module
from sharpen.training.fit import COMPLETE, fit, last_complete
from sharpen.training.groups import Batch
from sharpen.training.losses import Dpo, Likelihood, Square
from sharpen.training.trainer import GroupTrainer


@pytest.fixture(scope="module")
def likelihood():
    return likelihood_groups()


@pytest.fixture(scope="module")
def compared():
    return compared_groups()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_likelihood_of_what_is_fitted_rises(tmp_path, likelihood, lora_rank):
    batch = Batch.of(likelihood)
    before = sums(tiny(), batch)
    model = fitted(tmp_path, likelihood, Likelihood(), lora_rank=lora_rank, lr=1e-2)
    assert (sums(model, batch) - before).mean() > 1
    saved = load_model(tmp_path / "model", device="cpu")
    torch.testing.assert_close(sums(saved, batch), sums(model, batch), atol=1e-4, rtol=0)
    assert not model.training


@pytest.mark.parametrize("objective", [Square(1.0), Square(1.0, optimism=0.01), Dpo(1.0)], ids=repr)
def test_losses_of_pairs_fall(tmp_path, compared, objective):
    fitted(tmp_path, compared, objective, epochs=4.0)
    found = losses(tmp_path)
    assert len(found) == 12
    assert sum(found[-3:]) < 0.7 * sum(found[:3])


def test_the_first_loss_is_that_of_the_base_model(tmp_path, compared):
    fitted(tmp_path, compared, Square(1.0), epochs=1.0, batch=6)
    # all log-ratios are 0: what is left are the squared differences of rewards
    rewards = [group.reward for group in compared]
    want = sum((r[i] - r[j]) ** 2 for r in rewards for i, j in ((0, 1), (0, 2), (1, 2))) / 18
    assert losses(tmp_path)[0] == pytest.approx(want, rel=1e-4)


def test_a_batch_beyond_the_budget_gives_the_same_accumulated_step(tmp_path, compared):
    more = {"logging_steps": 1, "max_grad_norm": 0.0, "optim": "sgd"}
    more["gradient_accumulation_steps"] = 3
    runs = [
        fitted(
            tmp_path / str(max_tokens),
            compared,
            Square(1.0),
            max_tokens=max_tokens,
            epochs=1.0,
            lr=1e-3,
            more=more,
        )
        for max_tokens in (16384, 12)
    ]
    start, whole, bounded = (bits(model) for model in (tiny(), *runs))
    moved = (whole - start).norm()
    assert moved > 1e-3
    assert (whole - bounded).norm() < 1e-4 * moved
    assert losses(tmp_path / "12") == pytest.approx(losses(tmp_path / "16384"), rel=1e-5)


def test_the_budget_decides_how_a_step_runs(tmp_path, compared, monkeypatch):
    called = []
    backward = Scorer.backward
    monkeypatch.setattr(
        Scorer, "backward", lambda *a, **k: (called.append(1), backward(*a, **k))[1]
    )
    tokens = Batch.of(compared[:2]).n_tokens
    fitted(tmp_path / "fits", compared[:2], Square(1.0), max_tokens=tokens, epochs=1.0)
    assert called == []
    fitted(tmp_path / "bounded", compared[:2], Square(1.0), max_tokens=tokens - 1, epochs=1.0)
    assert called == [1]


class Killed(BaseException):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


# a checkpoint every second step, so that a mean loss over three is cut by it
@pytest.mark.parametrize(("step", "lora_rank", "logging"), [(3, 4, 1), (5, 0, 1), (5, 0, 3)])
def test_a_killed_run_ends_with_the_same_bits(
    tmp_path, compared, monkeypatch, step, lora_rank, logging
):
    changes = {"lora_rank": lora_rank, "more": {"logging_steps": logging}}
    want = fitted(tmp_path / "whole", compared, Square(1.0), **changes)
    init = GroupTrainer.__init__

    def killed(self, *args, callbacks, **kwargs):
        init(self, *args, callbacks=[*callbacks, KillAt(step)], **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GroupTrainer, "__init__", killed)
        with pytest.raises(Killed):
            fitted(tmp_path / "cut", compared, Square(1.0), **changes)
    assert not (tmp_path / "cut" / "model").exists()
    # what a kill in the middle of a checkpoint leaves behind
    torn = tmp_path / "cut" / "checkpoints" / f"checkpoint-{step + 90}"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    got = fitted(tmp_path / "cut", compared, Square(1.0), **changes)
    assert torch.equal(bits(got), bits(want))
    for name in ("losses.jsonl", "model/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("place", ["checkpoint", "model"])
def test_a_kill_while_something_is_saved_costs_no_bit(tmp_path, compared, monkeypatch, place):
    """Of the last of all: every step is done, and nothing is left but to save."""
    want = fitted(tmp_path / "whole", compared, Square(1.0))
    with monkeypatch.context() as patch:
        flushed = []

        def killed(folder):
            flushed.append(folder)
            if len(flushed) == {"checkpoint": 3, "model": 4}[place]:
                raise Killed

        patch.setattr(fit_module, "flush", killed)
        with pytest.raises(Killed):
            fitted(tmp_path / "cut", compared, Square(1.0))
    assert not (tmp_path / "cut" / "model").exists()
    sealed = {"checkpoint": "checkpoint-4", "model": "checkpoint-6"}[place]
    assert last_complete(tmp_path / "cut" / "checkpoints").name == sealed
    got = fitted(tmp_path / "cut", compared, Square(1.0))
    assert torch.equal(bits(got), bits(want))
    whole, again = (tmp_path / x / "losses.jsonl" for x in ("whole", "cut"))
    assert whole.read_bytes() == again.read_bytes()


def test_a_checkpoint_is_sealed_once_its_bytes_are_on_disk(tmp_path, likelihood, monkeypatch):
    synced = set()
    fsync = os.fsync

    def seen(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.basename(path).startswith(f".{COMPLETE}"):
            folder = os.path.dirname(path)
            names = {os.path.join(folder, name) for name in os.listdir(folder)} - {path}
            assert len(names) > 5
            assert names <= synced
        synced.add(path)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", seen)
    fitted(tmp_path, likelihood, Likelihood(), epochs=1.0)
    assert any(path.endswith("/.model.part/model.safetensors") for path in synced)


def test_checkpoints_are_ordered_by_number(tmp_path):
    assert last_complete(tmp_path) is None
    for step in (2, 10, 9, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_complete(tmp_path) is None
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert last_complete(tmp_path).name == "checkpoint-10"


@pytest.mark.filterwarnings("ignore:.*non-finite")
def test_weights_that_are_spoilt_are_not_saved(tmp_path, compared):
    with pytest.raises(TrainingError, match=r"training diverged: \d+ weights, .* hold NaN"):
        fitted(tmp_path, compared, Square(1.0), lr=1e30, more={"optim": "sgd", "logging_steps": 1})
    assert not (tmp_path / "model").exists()
    # written to the end: what has no number is null
    assert losses(tmp_path)[0] > 0
    assert losses(tmp_path)[-1] is None


def test_what_a_trainer_refuses_is_an_input_error(tmp_path, compared):
    with pytest.raises(InputError, match="`trainer`: transformers refuses these arguments"):
        fitted(tmp_path, compared, Square(1.0), more={"log_level": "loud"})


def test_a_finished_run_is_left_alone(tmp_path, likelihood):
    fitted(tmp_path, likelihood, Likelihood(), epochs=1.0)
    before = bits(tiny())
    again = fitted(tmp_path, likelihood, Likelihood(), epochs=1.0)
    assert torch.equal(bits(again), before)


def test_the_model_is_given_back_as_it_was(tmp_path, likelihood):
    model = tiny()
    fit(model, None, likelihood, Likelihood(), options(epochs=1.0), tmp_path)
    assert "forward" not in vars(model)
    assert not hasattr(model, "_original_forward")
    tiny().save_pretrained(tmp_path / "before")
    before, after = (tmp_path / name / "config.json" for name in ("before", "model"))
    assert after.read_text() == before.read_text()


def test_no_group_is_refused(tmp_path):
    with pytest.raises(InputError, match="`groups` must hold at least one prompt"):
        fit(tiny(), None, [], Likelihood(), options(), tmp_path)


def test_missing_extras_name_the_command(monkeypatch):
    monkeypatch.setattr(fit_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'needs accelerate; pip install "sharpen\[train\]"'):
        fit_module.require_train()
