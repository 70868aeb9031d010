"""`sharpen sft`, `rlhf` and `xpo` on the shipped model: what they leave behind, kills, refusals."""

import gc
import json
import shutil

import pytest
import torch
from transformers import TrainerCallback

from sharpen.cli import main
from sharpen.models import load_model
from sharpen.scoring import Scorer
from sharpen.training.trainer import GroupTrainer

COMMON = [
    "--model", "game24", "--task", "game24", "--limit", "6", "--max-new-tokens", "40",
    "--max-tokens", "2000", "--device", "cpu", "--batch", "2", "--save-every", "1",
    "--trainer", "logging_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sft"
    argv = ["sft", *COMMON, "-n", "6", "--epochs", "3", "--lr", "3e-4", "--out", str(out)]
    assert main(argv) == 0
    return out, argv


def total(model, samples, chosen):
    prompts = [row["prompt_ids"] for row in samples]
    picked = [[row["completion_ids"][i]] for row, i in zip(samples, chosen, strict=True)]
    return Scorer(model).score(prompts, picked).reward("logprob").sum().item()


def test_sft_fits_the_most_probable_sample_of_each_prompt(sft):
    out, _ = sft
    samples = rows(out / "samples.jsonl")
    sums = [[sum(x) for x in row["logprobs"]] for row in samples]
    chosen = [max(range(6), key=row.__getitem__) for row in sums]
    base, model = (load_model(m, device="cpu") for m in ("game24", out / "model"))
    before = sum(row[i] for row, i in zip(sums, chosen, strict=True))
    assert total(base, samples, chosen) == pytest.approx(before, abs=1e-3)
    assert total(model, samples, chosen) > before + 0.5
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["setting"], summary["prompts_fitted"]) == ("inductive", 6)
    assert summary["base_logprob_fitted"] == pytest.approx(before / 6, abs=1e-3)
    losses = rows(out / "losses.jsonl")
    assert [row["step"] for row in losses] == list(range(1, 10))
    assert losses[-1]["loss"] < losses[0]["loss"]


def test_the_model_is_one_that_bon_takes(sft, tmp_path, capsys):
    argv = ["bon", *COMMON[:10], "-n", "2", "--model", str(sft[0] / "model"), "--device", "cpu"]
    assert main([*argv, "--out", str(tmp_path / "bon")]) == 0
    assert "Best of N" in capsys.readouterr().out


def test_the_same_command_again_samples_and_trains_nothing(sft, monkeypatch, capsys):
    out, argv = sft
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != "summary.json"}
    monkeypatch.setattr(GroupTrainer, "train", lambda self: pytest.fail("trained again"))
    assert main(argv) == 0
    # the folder itself, its summary and its lock are touched
    after = {p: p.stat().st_mtime_ns for p in before}
    changed = {p.name for p in before if p.is_file() and before[p] != after[p]}
    assert changed <= {".run.json.lock"}
    assert f"model: {out / 'model'}" in capsys.readouterr().out
    assert main([*argv, "--lr", "1e-3"]) == 2
    assert "lr was 0.0003, is 0.001" in capsys.readouterr().err


class Killed(BaseException):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def kill_at(patch, step):
    init = GroupTrainer.__init__

    def killed(self, *args, callbacks, **kwargs):
        init(self, *args, callbacks=[*callbacks, KillAt(step)], **kwargs)

    patch.setattr(GroupTrainer, "__init__", killed)


def test_a_killed_sft_ends_with_the_same_weights(sft, tmp_path, monkeypatch):
    whole, argv = sft
    out = tmp_path / "cut"
    argv = [*argv[:-1], str(out)]
    for step in (4, 7):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                main(argv)
    assert main(argv) == 0
    for name in ("model/model.safetensors", "losses.jsonl", "samples.jsonl", "scores.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_soft_weights_fit_every_sample(sft, tmp_path, capsys):
    argv = ["sft", *COMMON, "--samples", str(sft[0] / "samples.jsonl"), "--weights", "soft"]
    assert main([*argv, "--soft-temperature", "0.5", "--out", str(tmp_path / "soft")]) == 0
    assert "fitted 36 completions of 6 of 6 prompts" in capsys.readouterr().out
    assert not (tmp_path / "soft" / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("extra", "n_pairs"),
    [
        (["--pairs", "random"], 18),
        (["--pairs", "all", "--standardise", "prompt", "--reward", "majority"], 90),
        (["--pairs", "best_worst", "--loss", "dpo", "--lora-rank", "2"], 6),
    ],
    ids=["random", "all", "dpo"],
)
def test_rlhf_fits_pairs(sft, tmp_path, capsys, extra, n_pairs):
    out = tmp_path / "rlhf"
    argv = ["rlhf", *COMMON, "--samples", str(sft[0] / "samples.jsonl"), "--lr", "1e-5", *extra]
    assert main([*argv, "--epochs", "2", "--out", str(out)]) == 0
    assert f"fitted {n_pairs} pairs of 6 of 6 prompts" in capsys.readouterr().out
    losses = [row["loss"] for row in rows(out / "losses.jsonl")]
    assert len(losses) == 6
    assert sum(losses[3:]) < sum(losses[:3])
    # each step moves the policy, so the first alone is that of the base model
    if "dpo" in extra:
        assert losses[0] == pytest.approx(0.6931, abs=1e-3)


def test_xpo_samples_from_the_policy_keeps_the_best_round_and_goes_on(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    argv = ["xpo", *COMMON, "--limit", "3", "-n", "2", "--rounds", "2", "--validation", "1"]
    assert main([*argv, "--lr", "1e-5", "--out", str(whole)]) == 0
    assert "J_beta on 1 held-out prompts: base -" in capsys.readouterr().out
    found = rows(whole / "rounds.jsonl")
    assert [row["round"] for row in found] == [0, 1, 2]
    best = max(found, key=lambda row: row["value"])["round"]
    if best:
        kept = whole / f"round-{best}" / "model" / "model.safetensors"
        assert kept.read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    # the base's samples: one for each side of each round's pairs
    base_rows = rows(whole / "samples.jsonl")
    assert [len(row["completions"]) for row in base_rows] == [4, 4]
    # the policy of round 2 is the model of round 1, not the base
    policy = load_model(whole / "round-1" / "model", device="cpu")
    second = rows(whole / "round-2" / "samples.jsonl")
    scored = Scorer(policy).score(
        [row["prompt_ids"] for row in second], [row["completion_ids"] for row in second]
    )
    drawn = [sum(x) for row in second for x in row["logprobs"]]
    torch.testing.assert_close(scored.reward("logprob"), torch.tensor(drawn), atol=1e-4, rtol=0)
    # optimism alpha (V + R)^2 from what was seen; V is 0 as long as the policy is the base
    first = rows(whole / "round-1" / "samples.jsonl")
    seen = [sum(x) for row in first for x in row["logprobs"]]
    seen += [sum(x) for row in base_rows for x in row["logprobs"][:2]]
    assert found[1]["optimism"] == pytest.approx(1e-4 * min(seen) ** 2, rel=1e-3)
    # killed in the middle of round 2, whose last checkpoint is torn
    shutil.copytree(whole, cut)
    for gone in ("model", "round-2/model", "round-2/validation"):
        shutil.rmtree(cut / gone)
    last = max((cut / "round-2" / "checkpoints").iterdir())
    (last / "complete").unlink()
    assert main([*argv, "--lr", "1e-5", "--out", str(cut)]) == 0
    for name in ("model/model.safetensors", "round-2/model/model.safetensors", "rounds.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_transductive_setting_is_named(sft, tmp_path):
    argv = ["sft", *COMMON, "-n", "2", "--split", "sharpen+test", "--limit", "2"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["setting"] == "transductive"


BASE = ["--model", "game24", "--task", "game24", "--out", "out", "--max-new-tokens", "8"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rlhf", *BASE, "--beta", "0"], "`beta` must be above 0 and finite, got 0.0"),
        (["rlhf", *BASE, "--beta", "-1"], "`beta` must be above 0 and finite, got -1.0"),
        (["xpo", *BASE, "--beta", "nan"], "`beta` must be above 0 and finite, got nan"),
        (["rlhf", *BASE, "-n", "1"], "`n` must be at least 2 for pairs, got 1"),
        (["xpo", *BASE, "--alpha", "-1"], "`alpha` must be at least 0"),
        (["xpo", *BASE, "--rounds", "0"], "`rounds` must be at least 1, got 0"),
        (["xpo", *BASE, "--reward", "majority"], "in xpo, got 'majority'"),
        (["xpo", *BASE, "--temperature", "0.5"], "must be 1 in xpo"),
        (["xpo", *BASE, "--validation", "250"], "must leave prompts to fit, got 250 of 250"),
        (["sft", *BASE, "--lr", "0"], "`lr` must be above 0 and finite, got 0.0"),
        (["sft", *BASE, "--batch", "0"], "`batch` must be at least 1, got 0"),
        (["sft", *BASE, "--reward", "beauty"], "`reward` must be one of"),
        (["sft", *BASE, "--soft-temperature", "0"], "`soft_temperature` must be above 0"),
        (["sft", *BASE, "--trainer", "bf16"], "`trainer` must be NAME=VALUE"),
        (["sft", *BASE, "--trainer", "beta=1"], "`trainer` must be NAME=VALUE"),
        (["sft", *BASE, "--trainer", "seed=1"], "must not set seed, which --seed sets"),
        (["sft", *BASE, "--device", "cuda:1"], "`device` must be cpu or cuda in training"),
        (["sft", *BASE, "--samples", "none.jsonl"], "cannot read 'none.jsonl'"),
        (["sft", *BASE[:2], *BASE[4:]], "give one of `--task` and `--prompts`, got neither"),
        (
            ["sft", *BASE[:2], *BASE[4:], "--prompts", "in.jsonl", "--reward", "majority"],
            "`reward` majority needs answers, which only a task can extract",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value[:1] + value[9:]),
)
def test_bad_settings_are_one_line_and_nothing_is_written(
    argv, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert sum(line.startswith("sharpen: ") and "`" in line for line in error) <= 1
    assert list(tmp_path.iterdir()) == []


def test_samples_of_other_prompts_are_refused(sft, tmp_path, capsys):
    argv = ["rlhf", *COMMON, "--samples", str(sft[0] / "samples.jsonl"), "--limit", "7"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "must hold samples of prompt 'game24-" in capsys.readouterr().err


def test_several_processes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sft", *BASE[:4], "--out", str(tmp_path / "out")]) == 2
    assert "must run in one process" in capsys.readouterr().err
