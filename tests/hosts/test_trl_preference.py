"""DPO and KTO with shared prompts, and reference log-probs that come with the data."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from helpers.trl_tiny import PROMPTS, QUIET, saved
from sharpen.errors import InputError
from sharpen.integrations.trl import (
    SharedPrefixDPOTrainer,
    SharedPrefixKTOTrainer,
    use_reference_columns,
)
from sharpen.models import load_tokenizer
from sharpen.scoring import Scorer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
ANSWERS = ["8 + 4 = 12", "4 * 6 = 24", "3 + 4", "8 * 4 = 32 left: 4", "2 - 1", "1 + 2 = 3 left"]
LORA = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


def pairs(**columns):
    rows = [
        {"prompt": PROMPTS[i % 2], "chosen": ANSWERS[i], "rejected": ANSWERS[-i - 1]}
        for i in range(4)
    ]
    return Dataset.from_list(
        [row | {name: x[i] for name, x in columns.items()} for i, row in enumerate(rows)]
    )


def dpo(trainer_class, folder, out, data=None, *, peft_config=None, eval_dataset=None, **options):
    options = QUIET | {"per_device_train_batch_size": 4, "max_steps": 3} | options
    args = DPOConfig(output_dir=str(out), learning_rate=1e-3, **options)
    trainer = trainer_class(
        model=folder,
        args=args,
        train_dataset=data or pairs(),
        eval_dataset=eval_dataset,
        processing_class=load_tokenizer("game24"),
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def kto(trainer_class, folder, out, *, peft_config=None, **options):
    rows = [
        {"prompt": PROMPTS[i % 2], "completion": x, "label": i % 3 > 0}
        for i, x in enumerate(ANSWERS)
    ]
    options = QUIET | {"per_device_train_batch_size": 6, "max_steps": 3} | options
    args = KTOConfig(output_dir=str(out), learning_rate=1e-3, **options)
    trainer = trainer_class(
        model=folder,
        args=args,
        train_dataset=Dataset.from_list(rows),
        peft_config=peft_config,
        processing_class=load_tokenizer("game24"),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(trainer):
    """What was logged at each step, and where the parameters moved."""
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert len(log) == 3
    end = dict(trainer.model.named_parameters())
    return log, {n: end[n].detach() - p for n, p in start.items()}


def judged_together(theirs, ours):
    (their_log, their_moves), (our_log, our_moves) = theirs, ours
    skipped = {"step_time", "epoch", "learning_rate", "num_tokens"}
    for a, b in zip(their_log, our_log, strict=True):
        assert a.keys() == b.keys()
        # at the first step policy and reference are equal, and the sign is one of rounding
        unsure = {"rewards/accuracies"} if abs(a["rewards/margins"]) < 1e-3 else set()
        for name in a.keys() - skipped - unsure:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-4), name
    assert sum(x.norm() for x in their_moves.values()) > 0
    for name, move in their_moves.items():
        assert (our_moves[name] - move).norm() <= 0.02 * move.norm() + 1e-6, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"use_weighting": True, "loss_type": ["ipo"]},
        {"ld_alpha": 0.5, "precompute_ref_log_probs": True},
        {"peft_config": LORA},
    ],
    ids=["plain", "accumulated", "weighted", "precomputed", "peft"],
)
def test_dpo_takes_the_steps_of_trl(options, folder, tmp_path):
    found = [
        trained(dpo(kind, folder, tmp_path / kind.__name__, **options))
        for kind in (DPOTrainer, SharedPrefixDPOTrainer)
    ]
    judged_together(*found)


@pytest.mark.parametrize(
    "options",
    [{}, {"loss_type": "apo_zero_unpaired"}, {"peft_config": LORA}],
    ids=["kto", "apo", "peft"],
)
def test_kto_takes_the_steps_of_trl(options, folder, tmp_path):
    found = [
        trained(kto(kind, folder, tmp_path / kind.__name__, **options))
        for kind in (KTOTrainer, SharedPrefixKTOTrainer)
    ]
    judged_together(*found)


def test_a_pair_reads_its_prompt_once(folder, tmp_path):
    trainer = dpo(SharedPrefixDPOTrainer, folder, tmp_path)
    read = []
    trainer.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.compute_ref_log_probs(trainer.model, batch)
    whole = int(batch["attention_mask"].sum()) - 2
    assert read[-1] <= whole - len(trainer.train_dataset[0]["prompt_ids"])


def reference(folder, data):
    """Summed log-probs of chosen and rejected, as anybody with a scorer makes the columns."""
    tokenized = dpo(DPOTrainer, folder, folder + "/columns", data).train_dataset
    prompts = [row["prompt_ids"] for row in tokenized]
    both = [[row["chosen_ids"], row["rejected_ids"]] for row in tokenized]
    reward = Scorer(folder).score(prompts, both).reward("logprob").view(-1, 2)
    return {"ref_chosen_logps": reward[:, 0].tolist(), "ref_rejected_logps": reward[:, 1].tolist()}


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "TRL's own"])
def test_reference_columns_take_the_place_of_the_reference(shared, folder, tmp_path):
    columns = reference(folder, pairs())
    want = trained(dpo(DPOTrainer, folder, tmp_path / "trl"))
    trainer_class = SharedPrefixDPOTrainer if shared else DPOTrainer
    trainer = dpo(trainer_class, folder, tmp_path / "own", pairs(**columns))
    if not shared:
        assert use_reference_columns(trainer)
    assert trainer.ref_model is None
    judged_together(want, trained(trainer))


def test_columns_of_another_reference_are_really_read(folder, tmp_path):
    columns = {name: [x - 3 for x in row] for name, row in reference(folder, pairs()).items()}
    columns["ref_chosen_logps"] = [x + 1 for x in columns["ref_chosen_logps"]]
    trainer = dpo(SharedPrefixDPOTrainer, folder, tmp_path, pairs(**columns), beta=0.5)
    log, _ = trained(trainer)
    # a step from a policy whose own ratios are 2 and 3 nats
    assert log[0]["rewards/chosen"] == pytest.approx(0.5 * 2, abs=1e-3)
    assert log[0]["rewards/rejected"] == pytest.approx(0.5 * 3, abs=1e-3)


def test_columns_in_one_set_alone_are_refused(folder, tmp_path):
    columns = reference(folder, pairs())
    with pytest.raises(InputError, match="`eval_dataset` must have the columns"):
        dpo(SharedPrefixDPOTrainer, folder, tmp_path, pairs(**columns), eval_dataset=pairs())
    with pytest.raises(InputError, match="`train_dataset` must have the columns"):
        use_reference_columns(dpo(DPOTrainer, folder, tmp_path))


def test_columns_and_a_moving_reference_are_refused(folder, tmp_path):
    columns = reference(folder, pairs())
    with pytest.raises(InputError, match="`sync_ref_model` must be False"):
        dpo(SharedPrefixDPOTrainer, folder, tmp_path, pairs(**columns), sync_ref_model=True)


def test_evaluation_reads_the_same_columns(folder, tmp_path):
    columns = reference(folder, pairs())
    data = pairs(**columns)
    found = [
        dpo(
            kind, folder, tmp_path, rows, eval_dataset=rows, per_device_eval_batch_size=4
        ).evaluate()
        for kind, rows in ((DPOTrainer, pairs()), (SharedPrefixDPOTrainer, data))
    ]
    assert found[1]["eval_loss"] == pytest.approx(found[0]["eval_loss"], abs=1e-5)
    assert torch.isfinite(torch.tensor(found[1]["eval_loss"]))
