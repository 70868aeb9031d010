"""Options of a run and fields of TrainingArguments: what is taken, and refusals in one line."""

import pytest

from sharpen.errors import InputError
from sharpen.training.options import FitOptions, more_arguments, trainer_arguments

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr": 0.0}, r"`lr` must be above 0 and finite, got 0\.0"),
        ({"lr": -1e-4}, "`lr` must be above 0 and finite"),
        ({"lr": NAN}, "`lr` must be above 0 and finite, got nan"),
        ({"lr": INF}, "`lr` must be above 0 and finite, got inf"),
        ({"epochs": 0.0}, r"`epochs` must be above 0 and finite, got 0\.0"),
        ({"epochs": INF}, "`epochs` must be above 0 and finite, got inf"),
        ({"batch": 0}, "`batch` must be at least 1, got 0"),
        ({"lora_rank": -1}, "`lora_rank` must be at least 0, got -1"),
        ({"save_every": 0}, "`save_every` must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        FitOptions(**option)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("bf16", "must be NAME=VALUE with a field"),
        ("beta=1", "must be NAME=VALUE with a field"),
        ("=1", "must be NAME=VALUE with a field"),
        ("output_dir=x", "must not set output_dir, which --out sets"),
        ("learning_rate=1", "must not set learning_rate, which --lr sets"),
        ("use_cpu=true", "must not set use_cpu, which --device sets"),
        ("eval_strategy=steps", "must not set eval_strategy: there is nothing to evaluate on"),
        ("save_only_model=true", "must not set save_only_model: a resumed run needs"),
        ("ignore_data_skip=true", "must not set ignore_data_skip: a resumed run must see"),
        ("label_smoothing_factor=0.1", "must not set label_smoothing_factor: the losses here"),
        ("neftune_noise_alpha=5", "must not set neftune_noise_alpha: a log-ratio must not be"),
        ("deepspeed=x.json", "must not set deepspeed: several processes run DDP"),
        ("torch_compile=true", "must not set torch_compile: shared prompts change"),
        ("bf16=maybe", "must set bf16 to true or false, got 'maybe'"),
        ("bf16=1", "must set bf16 to true or false, got 1"),
        ("weight_decay=much", "must set weight_decay to a number, got 'much'"),
        ("max_grad_norm=true", "must set max_grad_norm to a number, got True"),
        ("gradient_accumulation_steps=0", "gradient_accumulation_steps to 1 or more, got 0"),
        ("dataloader_num_workers=-1", "dataloader_num_workers to 0 or more, got -1"),
    ],
)
def test_fields_that_cannot_be_are_refused(pair, message):
    with pytest.raises(InputError, match=message) as refusal:
        more_arguments([pair])
    assert str(refusal.value).startswith("`trainer` must")
    assert "\n" not in str(refusal.value)


def test_a_field_is_set_once():
    with pytest.raises(InputError, match="must set weight_decay once, got 'weight_decay=2' too"):
        more_arguments(["weight_decay=1", "weight_decay=2"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lr_scheduler_type": "slow"}, "slow is not a valid SchedulerType"),
        ({"lr_scheduler_kwargs": {"speed": 1}}, "unexpected keyword argument 'speed'"),
        ({"optim": "adam"}, "adam is not a valid OptimizerNames"),
        ({"adam_beta1": 2.0}, "Invalid beta parameter"),
        ({"report_to": "paper"}, "paper is not supported"),
        ({"logging_steps": 0}, "requires non-zero --logging_steps"),
        ({"accelerator_config": "no.json"}, "No such file"),
        ({"save_total_limit": 1}, "must leave save_total_limit at 2 or more, got 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_transformers_refuses_is_one_line_and_nothing_is_written(tmp_path, more, message):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=message) as refusal:
        trainer_arguments(FitOptions(more=more), out, is_cpu=True)
    assert str(refusal.value).startswith("`trainer`")
    assert "\n" not in str(refusal.value)
    assert not out.exists()


def test_what_is_asked_reaches_the_trainer(tmp_path):
    pairs = ["weight_decay=0.1", "lr_scheduler_type=cosine", "warmup_steps=0.1", "bf16=true"]
    options = FitOptions(
        lr=3e-5, epochs=2.5, batch=3, save_every=7, seed=5, more=more_arguments(pairs)
    )
    args = trainer_arguments(options, tmp_path, is_cpu=True)
    assert (args.learning_rate, args.num_train_epochs, args.save_steps) == (3e-5, 2.5, 7)
    assert (args.per_device_train_batch_size, args.seed, args.weight_decay) == (3, 5, 0.1)
    assert (args.lr_scheduler_type, args.warmup_steps, args.bf16) == ("cosine", 0.1, True)
    assert (args.save_total_limit, args.n_gpu, args.use_cpu) == (2, 0, True)
