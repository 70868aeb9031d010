"""Trainers of ours beside TRL's own: log-probs, entropies, losses and gradients of one step."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig

from helpers.trl_tiny import batch, gradients, online, saved
from sharpen.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated:FutureWarning"),
]
KINDS = ("GRPO", "RLOO")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


def per_token(trainer, *, entropy, model=None, **options):
    ids, mask, C = batch()
    return trainer._get_per_token_logps_and_entropies(
        model or trainer.model, ids, mask, C, compute_entropy=entropy, **options
    )


def step(trainer, *, entropy):
    """Log-probs, entropies and gradients of a fixed sum of them."""
    trainer.model.train()
    logprob, H, _ = per_token(trainer, entropy=entropy)
    generator = torch.Generator().manual_seed(1)
    w, u = (torch.randn(logprob.shape, generator=generator) for _ in range(2))
    loss = (logprob * w).sum() if H is None else (logprob * w + H * u).sum()
    loss.backward()
    return logprob.detach(), None if H is None else H.detach(), gradients(trainer.model)


def truth(model, T, *, entropy):
    """The same in fp64, by the model's own logits, each row alone."""
    ids, mask, C = batch()
    model = copy.deepcopy(model).double()
    for part in model.modules():
        vars(part).pop("forward", None)
    logprob, H = [], []
    for row, real in zip(ids, mask.bool(), strict=True):
        n = int(real[-C:].sum())
        log_p = (model(input_ids=row[real][None]).logits[0, -n - 1 : -1] / T).log_softmax(1)
        found = log_p.gather(1, row[real][-n:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
        for out, x in zip((logprob, H), found, strict=True):
            out.append(torch.nn.functional.pad(x, (0, C - n)))
    logprob, H = torch.stack(logprob), torch.stack(H)
    generator = torch.Generator().manual_seed(1)
    w, u = (torch.randn(logprob.shape, generator=generator) for _ in range(2))
    ((logprob * w + H * u) if entropy else logprob * w).sum().backward()
    return logprob.detach(), H.detach(), gradients(model)


@pytest.mark.parametrize("entropy", [True, False], ids=["entropy", "logprob"])
@pytest.mark.parametrize(("kind", "T"), [("GRPO", 0.7), ("GRPO", 1.0), ("RLOO", 1.3)])
def test_values_and_gradients_are_as_exact_as_those_of_trl(kind, T, entropy, folder, tmp_path):
    trainers = [online(kind, folder, tmp_path, shared=s, temperature=T) for s in (False, True)]
    (theirs, their_H, their_g), (ours, our_H, our_g) = (step(t, entropy=entropy) for t in trainers)
    true, true_H, true_g = truth(trainers[0].model, T, entropy=entropy)
    assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max() + 2e-6
    if entropy:
        assert (our_H - true_H).abs().max() <= 2 * (their_H - true_H).abs().max() + 2e-6
    assert our_g.keys() == their_g.keys() == true_g.keys()
    for name, g in true_g.items():
        noise = (their_g[name] - g).norm()
        assert (our_g[name] - g).norm() <= 4 * noise + 1e-6 * g.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_of_the_reference_in_any_chunks(kind, folder, tmp_path):
    found = []
    for shared in (False, True):
        trainer = online(kind, folder, tmp_path, shared=shared, beta=0.1, temperature=0.8)
        with torch.no_grad():
            found.append(
                per_token(trainer, entropy=False, model=trainer.ref_model, batch_size=3)[0]
            )
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_whole_where_there_are_no_gradients(kind, folder, tmp_path):
    trainer = online(kind, folder, tmp_path, shared=True)
    read = []
    trainer.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    ids, mask, C = batch()
    with torch.no_grad():
        per_token(trainer, entropy=False, batch_size=2)
    P = mask[[0, 4]][:, :-C].sum()
    # prompts once, completions without their last token
    assert read == [int(P + mask[:, -C:].sum() - len(ids))]


def steps(kind, folder, out, *, shared, **options):
    """Losses and parameters of a few whole steps."""
    trainer = online(kind, folder, out, shared=shared, learning_rate=1e-3, **options)
    trainer.train()
    history = [row for row in trainer.state.log_history if "reward" in row]
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return history, weights, trainer


def judged_together(theirs, ours, start):
    """Ours took the steps of TRL: the same samples, losses and parameters to rounding."""
    (their_log, their_p, _), (our_log, our_p, _) = theirs, ours
    assert len(their_log) > 0
    for a, b in zip(their_log, our_log, strict=True):
        assert a["reward"] == b["reward"]
        for name in ("entropy", "kl", "completions/mean_length", "grad_norm"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-4), name
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
    moved = {n: (their_p[n] - p).norm() for n, p in start.items()}
    assert sum(moved.values()) > 0
    for name, size in moved.items():
        assert (our_p[name] - their_p[name]).norm() <= 0.02 * size + 1e-6, name


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 2},
        {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"max_steps": 3, "steps_per_generation": 2, "beta": 0.05, "per_device_train_batch_size": 4},
        {"max_steps": 2, "mask_truncated_completions": True, "gradient_checkpointing": False},
    ],
    ids=["plain", "accumulated", "off-policy", "truncated"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_steps_are_those_of_trl(kind, options, folder, tmp_path):
    if kind == "RLOO" and "beta" not in options:
        options = options | {"beta": 0.0}
    start = dict(online(kind, folder, tmp_path, shared=False).model.named_parameters())
    runs = [steps(kind, folder, tmp_path, shared=s, **options) for s in (False, True)]
    judged_together(*runs, start)


def test_with_peft_the_reference_is_the_model_without_adapters(folder, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    options = {"peft_config": config, "beta": 0.1, "max_steps": 3, "steps_per_generation": 1}
    options |= {"temperature": 0.9, "num_iterations": 1}
    first = online("GRPO", folder, tmp_path, shared=False, **options)
    start = {n: p for n, p in first.model.named_parameters() if p.requires_grad}
    runs = [steps("GRPO", folder, tmp_path, shared=s, **options) for s in (False, True)]
    judged_together(*runs, start)
    # the KL term saw a reference that is not the policy
    assert all(log[-1]["kl"] > 0 for log, _, _ in runs)


def test_mixed_precision_takes_the_fused_head_of_both_models(folder, tmp_path, caplog):
    options = {"bf16": True, "beta": 0.1, "max_steps": 2}
    with caplog.at_level(logging.INFO, logger="sharpen"):
        (theirs, *_), (ours, *_) = (
            steps("GRPO", folder, tmp_path, shared=s, **options) for s in (False, True)
        )
    # bf16 products of other shapes
    for a, b in zip(theirs, ours, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.05)
        assert b["entropy"] == pytest.approx(a["entropy"], rel=0.01)
    assert caplog.text.count("takes the hidden route") == 2
    assert caplog.text.count("shares prompts by 'tree'") == 2
    assert "slower" not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_liger_kernel": True}, "`use_liger_kernel` must be False"),
        ({"cast_lm_head_to_fp32": True}, "never rounds logits"),
    ],
)
def test_what_is_not_supported_is_refused(options, message, folder, tmp_path):
    with pytest.raises(InputError, match=message):
        online("GRPO", folder, tmp_path, shared=True, **options)


def test_images_and_embeddings_are_refused(folder, tmp_path):
    trainer = online("GRPO", folder, tmp_path, shared=True)
    ids, *_ = batch()
    images = {"pixel_values": torch.zeros(len(ids), 3, 2, 2), "num_images": [1] * len(ids)}
    with pytest.raises(InputError, match="got `pixel_values`"):
        per_token(trainer, entropy=False, **images)
    embedded = trainer.model.get_input_embeddings()(ids)
    with pytest.raises(InputError, match="`input_ids` and `labels` by name"):
        trainer.model(inputs_embeds=embedded, labels=ids, fused_lm_head=True)
    with pytest.raises(InputError, match="got `output_router_logits`"):
        per_token(trainer, entropy=False, compute_aux_loss=True)


def test_without_the_flag_the_forward_is_the_models_own(folder, tmp_path):
    trainer = online("GRPO", folder, tmp_path, shared=True)
    ids, mask, _ = batch()
    plain = type(trainer.model).forward(trainer.model, input_ids=ids, attention_mask=mask)
    assert torch.equal(trainer.model(input_ids=ids, attention_mask=mask).logits, plain.logits)
