"""Two processes end with the weights of one, to rounding, and with the same as each other."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments

import helpers.launched as launched
from helpers.documented import blocks, ran
from helpers.kept_runs import assert_kept_as_by_one
from helpers.tiny import tiny
from helpers.tiny_groups import compared
from sharpen.errors import InputError
from sharpen.models import load_model
from sharpen.training.distributed import check_started, check_way, is_for_cpu
from sharpen.training.losses import Square
from sharpen.training.trainer import GroupTrainer
from workers.training_two_ranks import CASES, KEPT, fit, losses, weights


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = launched.two(["training_two_ranks.py", str(folder)], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: [torch.load(folder / f"{name}.{r}.pt") for r in (0, 1)] for name in CASES}
    return found | torch.load(folder / "found.pt") | {"folder": folder}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_fit_what_one_fits(two, tmp_path, name):
    first, second = two[name]
    assert (first["processes"], first["wrapped"]) == (2, "DistributedDataParallel")
    assert torch.equal(first["weights"], second["weights"])
    trainer, n_bounded, before = fit(CASES[name], tmp_path, 1)
    want = weights(trainer.model)
    moved = (want - before).norm()
    assert moved > 1e-4
    assert (first["weights"] - want).norm() < 1e-4 * moved
    assert first["losses"] == pytest.approx(losses(trainer), rel=1e-4)
    # all together, or none: one that waits for the gradients of the other would wait for ever
    assert first["bounded"] == second["bounded"]
    assert (first["bounded"] > 0) == ("bounded" in name) == (n_bounded > 0)
    if name == "some-bounded":
        assert first["bounded"] < 6


@pytest.mark.parametrize("name", KEPT)
def test_a_killed_fit_of_two_keeps_what_one_keeps(two, name):
    assert_kept_as_by_one(two["folder"], name, KEPT[name])


def test_a_checkpoint_is_sealed_when_all_have_written(two):
    assert two["sealed"] == [True, True]


def test_the_page_fits_in_several_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    page = "docs/algorithms/training.md"
    bash, script = blocks(page, "bash"), blocks(page, "python")[-1]
    (tmp_path / "fit.py").write_text(script)
    alone = script.replace("batch=3", "batch=6").replace("runs/several", "runs/one")
    for block, language in (*((block, "bash") for block in bash[-3:]), (alone, "python")):
        done = ran(block, language, tmp_path)
        # PyTorch's, of a process that has ended: 1 of 30 runs of a script without us
        is_gloo = "terminate called without an active exception" in done.stderr
        assert done.returncode == 0 or is_gloo, done.stderr[-3000:]
    assert (tmp_path / "runs" / "two" / "summary.json").exists()
    one, several = (
        weights(load_model(tmp_path / "runs" / name / "model")) for name in ("one", "several")
    )
    moved = one - weights(load_model("game24"))
    assert moved.norm() > 1e-3
    assert (several - one).norm() < 1e-4 * moved.norm()


def test_gradients_are_averaged_over_all_processes(two):
    assert two["average"] == [[3.0, 4.0], [0.5, 1.0], None, None]


def test_several_gpus_of_one_process_are_refused(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False
    )
    args._n_gpu = 1
    check_way(args, tiny())
    args._n_gpu = 2
    message = "one process must have one GPU, got 2; start it with `accelerate launch`"
    with pytest.raises(InputError, match=message):
        GroupTrainer(tiny(), compared(), Square(1.0), args)


@pytest.mark.parametrize("way", ["NO", "MULTI_CPU", "MULTI_GPU"])
def test_a_launcher_that_copies_the_model_is_taken(way):
    args = SimpleNamespace(fsdp=False, parallel_mode=SimpleNamespace(value="distributed"))
    check_started(SimpleNamespace(distributed_type=DistributedType(way)), args)


@pytest.mark.parametrize(
    ("environment", "has_gpu", "on_cpu"),
    [
        ({}, True, True),
        ({"WORLD_SIZE": "8"}, True, False),
        ({"WORLD_SIZE": "1"}, True, False),
        ({"WORLD_SIZE": "8"}, False, True),
        ({"WORLD_SIZE": "8", "ACCELERATE_USE_CPU": "true"}, True, True),
    ],
)
def test_processes_of_a_launcher_take_gpus_where_there_are_some(
    monkeypatch, environment, has_gpu, on_cpu
):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert is_for_cpu(tiny()) == on_cpu
    assert not is_for_cpu(tiny().to("meta"))
