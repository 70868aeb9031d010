"""Two processes that hold a part of each weight (FSDP) end with the weights of one that has all."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, TrainingArguments

import helpers.launched as launched
from helpers.kept_runs import assert_kept_as_by_one
from helpers.tiny import alone, tiny
from helpers.tiny_groups import compared
from sharpen import Scorer
from sharpen.errors import InputError
from sharpen.training.distributed import check_device, check_started
from sharpen.training.losses import Square
from sharpen.training.trainer import GroupTrainer
from workers.training_shards import CASES
from workers.training_two_ranks import KEPT, Case, fit, losses, start, trainer_of, weights

EXTRA = ("bf16", "lora-half", "efficient", "resumed", "refused", "dropped")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    done = launched.two(["training_shards.py", str(folder)], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def two(folder):
    return {n: [torch.load(folder / f"{n}.{r}.pt") for r in (0, 1)] for n in (*CASES, *EXTRA)}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("name", CASES)
def test_two_processes_with_parts_fit_what_one_fits(two, tmp_path, name):
    first, second = two[name]
    assert torch.equal(first["weights"], second["weights"])
    trainer, _, before = fit(CASES[name], tmp_path, 1)
    want = weights(trainer.model)
    moved = (want - before).norm()
    assert moved > 1e-4
    assert (first["weights"] - want).norm() < 1e-4 * moved
    assert first["losses"] == pytest.approx(losses(trainer), rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_held_in_parts(two, name):
    ranks = two[name]
    total = sum(p.numel() for p in start(CASES[name]).parameters())
    assert all(found["n_parts"] == found["n_weights"] for found in ranks)
    assert sum(found["held"] for found in ranks) == total
    assert max(found["held"] for found in ranks) < 0.51 * total


@pytest.mark.parametrize("name", CASES)
def test_all_run_the_same_number_of_forwards(two, name):
    first, second = two[name]
    assert first["ran"] == second["ran"]
    # a forward for the slopes of the loss beside its own
    is_bounded = not all(first["ran"])
    assert is_bounded == (CASES[name].max_tokens < 100)
    assert first["shares"] == ("lfm2" not in name)


def test_who_has_no_more_to_run_fills_up(two):
    first, second = two["some-bounded"]
    assert first["filled"] + second["filled"] > 0
    n_whole = first["ran"].count(True) - first["ran"].count(False)
    assert 0 < n_whole < 6


def test_half_precision_leaves_log_probs_whole(two):
    for found in two["bf16"]:
        logprob, prompts, completions = found["first"]
        assert logprob.dtype == torch.float32
        assert (logprob != logprob.bfloat16()).float().mean() > 0.9
        exact = alone(tiny().double(), prompts, completions)
        half = Scorer(tiny().bfloat16()).logprobs(prompts, completions)
        assert (logprob - exact).abs().max() <= 2 * (half - exact).abs().max()
        assert all(map(math.isfinite, found["losses"]))


def test_adapters_of_a_model_in_half_precision(two, tmp_path):
    case = Case(lora=True)
    one = trainer_of(case, tmp_path, 1, model=start(case, torch.bfloat16), bf16=True)
    one.train()
    for found in two["lora-half"]:
        assert found["n_parts"] == found["n_weights"]
        # to the rounding of bf16, which changes with what is in a batch
        assert found["losses"] == pytest.approx(losses(one), rel=0.05)


def test_weights_of_the_first_process_alone_do(two):
    """With `cpu_ram_efficient_loading`, the others have none to try the model with."""
    for found, whole in zip(two["efficient"], two["whole"], strict=True):
        assert torch.equal(found["weights"], whole["weights"])


def test_a_stopped_run_goes_on_to_the_same_bits(two, folder):
    for found in two["resumed"]:
        assert found["steps"] == [1, 2]
        assert torch.equal(found["weights"], found["straight"])
    saved = AutoModelForCausalLM.from_pretrained(folder / "resumed" / "model")
    assert torch.equal(weights(saved), two["resumed"][0]["straight"])


@pytest.mark.parametrize("name", KEPT)
def test_a_killed_fit_in_parts_keeps_what_one_keeps(two, folder, name):
    assert_kept_as_by_one(folder, name, KEPT[name])


def test_dropout_is_refused_where_slopes_come_first(two):
    for message in two["dropped"]:
        assert message.startswith("`loss` must be slopes while dropout is on")


def test_what_the_first_process_refuses_all_refuse(two):
    first, second = two["refused"]
    assert first == second
    assert "`model` must be causal, got LlamaForCausalLM" in first


def arguments(folder, **more):
    return TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", remove_unused_columns=False, **more
    )


def test_fsdp_without_a_launcher_is_refused(tmp_path):
    with pytest.raises(InputError, match="`fsdp` must be unset in a process that no launcher"):
        GroupTrainer(tiny(), compared(), Square(1.0), arguments(tmp_path, fsdp=True))


def test_a_model_in_parts_is_refused(tmp_path):
    model = tiny()
    model.lm_head.weight.device_mesh = "as of a DTensor"
    with pytest.raises(InputError, match=r"must be loaded whole, got 'lm_head.weight' in parts"):
        GroupTrainer(model, compared(), Square(1.0), arguments(tmp_path))


def test_shards_on_cpus_are_refused_before_anything_is_drawn():
    args = SimpleNamespace(
        fsdp=True, parallel_mode=SimpleNamespace(value="distributed"), device=torch.device("cpu")
    )
    with pytest.raises(InputError, match="FSDP must run on GPUs, got CPU processes"):
        check_device(args)
    for kind, fsdp in (("cuda", True), ("cpu", False)):
        args.device, args.fsdp = torch.device(kind), fsdp
        check_device(args)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("MULTI_CPU", "FSDP must run on GPUs, got MULTI_CPU, where accelerate"),
        ("FSDP", "FSDP must be of version 2, got version 1"),
        ("DEEPSPEED", "the launcher must be DDP or FSDP, got DEEPSPEED"),
        ("MEGATRON_LM", "the launcher must be DDP or FSDP, got MEGATRON_LM"),
    ],
)
def test_other_ways_to_shard_are_refused(way, message):
    accelerator = SimpleNamespace(
        distributed_type=DistributedType(way),
        device=torch.device("cpu"),
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)),
    )
    args = SimpleNamespace(fsdp=True, parallel_mode=SimpleNamespace(value="distributed"))
    with pytest.raises(InputError, match=message):
        check_started(accelerator, args)
