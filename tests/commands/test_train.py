"""`sharpen sft`, `rlhf` and `xpo` on the shipped model: what they leave behind, kills, refusals."""

import json
from itertools import combinations

import pytest
from transformers import TrainerCallback

from sharpen.cli import main
from sharpen.models import load_model
from sharpen.scoring import Scorer
from sharpen.training.trainer import GroupTrainer

COMMON = [
    "--model",
    "game24",
    "--task",
    "game24",
    "--limit",
    "6",
    "--max-new-tokens",
    "40",
    "--max-tokens",
    "2000",
    "--device",
    "cpu",
    "--batch",
    "2",
    "--save-every",
    "1",
    "--trainer",
    "logging_steps=1",
]


pytestmark = pytest.mark.usefixtures("frozen_heap")


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
        (["--pairs", "random"], 15),
        (["--pairs", "all", "--standardise", "prompt", "--reward", "majority"], 83),
        (["--pairs", "best_worst", "--loss", "dpo", "--lora-rank", "2"], 6),
    ],
    ids=["random", "all", "dpo"],
)
def test_rlhf_fits_pairs(sft, tmp_path, capsys, extra, n_pairs):
    out = tmp_path / "rlhf"
    argv = ["rlhf", *COMMON, "--samples", str(sft[0] / "samples.jsonl"), "--lr", "1e-5", *extra]
    assert main([*argv, "--epochs", "2", "--out", str(out)]) == 0
    assert f"fitted {n_pairs} pairs of 6 of 6 prompts" in capsys.readouterr().out
    if "all" in extra:
        # of 90 those of two completions that differ
        said = [[tuple(x) for x in r["completion_ids"]] for r in rows(sft[0] / "samples.jsonl")]
        assert n_pairs == sum(a != b for group in said for a, b in combinations(group, 2))
    losses = [row["loss"] for row in rows(out / "losses.jsonl")]
    assert len(losses) == 6
    assert sum(losses[3:]) < sum(losses[:3])
    # each step moves the policy, so the first alone is that of the base model
    if "dpo" in extra:
        assert losses[0] == pytest.approx(0.6931, abs=1e-3)


def test_the_transductive_setting_is_named(sft, tmp_path):
    argv = ["sft", *COMMON, "-n", "2", "--split", "sharpen+test", "--limit", "2"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["setting"] == "transductive"


def test_a_prompt_of_copies_counts_as_without_pairs(sft, tmp_path, capsys):
    out, path = tmp_path / "rlhf", tmp_path / "copies.jsonl"
    samples = rows(sft[0] / "samples.jsonl")
    for name in ("completions", "completion_ids", "logprobs", "finish_reasons"):
        samples[0][name] = samples[0][name][:1] * 6
    path.write_text("".join(json.dumps(row) + "\n" for row in samples))
    argv = ["rlhf", *COMMON, "--samples", str(path), "--pairs", "best_worst", "--lr", "1e-5"]
    assert main([*argv, "--out", str(out)]) == 0
    assert "fitted 5 pairs of 5 of 6 prompts" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["prompts_fitted"] == 5
