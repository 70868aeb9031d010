"""Settings and files that `sft`, `rlhf` and `xpo` refuse: one line, and nothing is written."""

import json

import pytest

from sharpen.cli import main
from sharpen.models import load_tokenizer

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
        (["rlhf", *BASE, "-n", "0"], "`n` must be at least 2 for pairs, got 0"),
        (["rlhf", *BASE, "--beta", "inf"], "`beta` must be above 0 and finite, got inf"),
        (
            ["rlhf", *BASE, "--loss", "dpo", "--standardise", "all"],
            "`standardise` must be none with `--loss dpo`, got all",
        ),
        (["xpo", *BASE, "--alpha", "nan"], "`alpha` must be at least 0 and finite, got nan"),
        (["xpo", *BASE, "--alpha", "car"], "`alpha` must be a number or auto, got 'car'"),
        (
            ["xpo", *BASE, "--exploration", "0.1"],
            "`exploration` must be left out with `--alpha 1e-4`, got 0.1",
        ),
        (
            ["xpo", *BASE, "--alpha", "auto", "--exploration", "-1"],
            "`exploration` must be at least 0 and finite, got -1.0",
        ),
        (["xpo", *BASE, "--validation", "0"], "`validation` must be at least 1, got 0"),
        (["xpo", *BASE, "-n", "0"], "`n` must be at least 1, got 0"),
        (["xpo", *BASE, "--reward", "rpc"], "in xpo, got 'rpc'"),
        (["xpo", *BASE, "--top-p", "0.9"], "`temperature` and `top_p` must be 1 in xpo"),
        (
            ["sft", *BASE, "--weights", "soft", "--temperature", "0.5"],
            "`temperature` and `top_p` must make plain draws of game24 for `--weights soft`, whose "
            "optimum is another on other samples, got draws of game24, temperature 0.5; use",
        ),
        (["sft", *BASE, "--weights", "soft", "--temperature", "0"], "game24, temperature 0; use"),
        (["sft", *BASE, "--weights", "soft", "--top-p", "0.9"], "draws of game24, top_p 0.9; use"),
        (
            ["rlhf", *BASE, "--temperature", "0"],
            "`temperature` must be above 0 in rlhf, got 0: greedy draws of a prompt are all one",
        ),
        (["sft", *BASE, "-n", "0"], "`n` must be at least 1, got 0"),
        (["sft", *BASE, "--epochs", "0"], "`epochs` must be above 0 and finite, got 0.0"),
        (["sft", *BASE, "--limit", "0"], "`limit` must be at least 1, got 0"),
        (["sft", *BASE, "--max-tokens", "0"], "`max_tokens` must be at least 1, got 0"),
        (["sft", *BASE, "--lora-rank", "-1"], "`lora_rank` must be at least 0, got -1"),
        (["sft", *BASE, "--soft-temperature", "inf"], "above 0 and finite, got inf"),
        (["sft", *BASE, "--split", "dev"], "`split` must be one of base, sharpen, test, free"),
        (["sft", *BASE, "--split", ""], "`split` must be one of base, sharpen, test, free"),
        (["sft", *BASE, "--split", "sharpen+"], "for task game24, got ''"),
        (
            ["sft", *BASE, "--split", "sharpen+free+sharpen"],
            "`split` must name each split once, got 'sharpen+free+sharpen'",
        ),
        (["sft", *BASE, "--trainer", "optim=adam"], "adam is not a valid OptimizerNames"),
        (["sft", *BASE, "--trainer", "report_to=paper"], "paper is not supported"),
        (["sft", *BASE, "--trainer", "save_only_model=true"], "a resumed run needs the optimizer"),
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


def row(prompt_id="p", **changes):
    good = {
        "prompt_id": prompt_id,
        "prompt": PROMPT,
        "prompt_ids": IDS,
        "completions": ["a", "b"],
        "completion_ids": [[5, 2], [6, 2]],
        "finish_reasons": ["stop", "stop"],
    }
    return {name: value for name, value in (good | changes).items() if value is not None}


PROMPT = "Numbers: 1 2 3 4 Target: 24\n"
IDS = load_tokenizer("game24")(PROMPT)["input_ids"]
CUT = {"finish_reasons": ["length", "length"]}


@pytest.mark.parametrize(
    ("command", "rows", "message"),
    [
        ("sft", [], "must hold samples of prompt 'p', got none; give the same prompts"),
        ("rlhf", [row("q")], "must hold samples of prompt 'p', got none"),
        ("sft", [row(prompt_ids=[1])], "samples of prompt 'p', got samples of other tokens"),
        ("sft", [row(), row("q"), row()], "in.jsonl:3: `prompt_id` 'p' must be there once"),
        ("sft", [row(completion_ids=None)], "in.jsonl:1: must have the field `completion_ids`"),
        ("sft", [row(prompt_id=7)], "in.jsonl:1: `prompt_id` must be text, got 7"),
        ("sft", [row(finish_reasons=["stop"])], "must be lists of one length, got 2, 2, 1"),
        ("sft", [row(completions="ab")], "must be lists of one length, got None, 2, 2"),
        ("sft", [row(completion_ids=[["a"], [2]])], "`completion_ids` must be a list of integers"),
        ("sft", [row(completion_ids=[[999], [2]])], "token ids must be in [0, 214), got 999"),
        ("sft", [row(**CUT)], "none of 2 was ended by the model with a finite log-prob"),
        ("rlhf", [row(**CUT)], "none of 2 was ended by the model"),
        (
            "rlhf",
            [row(finish_reasons=["stop", "length"])],
            "`samples` must leave at least two finished completions of some prompt, got none",
        ),
        (
            "rlhf",
            [row(completion_ids=[[5, 2], [5, 2]])],
            "two finished completions of some prompt, got none that differ; raise",
        ),
    ],
)
def test_samples_that_cannot_be_fitted_are_refused(
    command, rows, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt_id": "p", "prompt": PROMPT}) + "\n")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    argv = [command, "--model", "game24", "--prompts", "prompts.jsonl", "--samples", "in.jsonl"]
    assert main([*argv, "--device", "cpu", "--out", "out"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sharpen: ")
    assert message in error
    assert not (tmp_path / "out" / "model").exists()


def test_no_prompt_at_all_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("\n")
    argv = ["xpo", "--model", "game24", "--prompts", "prompts.jsonl", "--device", "cpu"]
    assert main([*argv, "--out", "out"]) == 2
    assert "at least one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("fsdp=true", "`fsdp` must be unset in a process that no launcher started, got True"),
        ("deepspeed=x.json", "must not set deepspeed: several processes run DDP, or FSDP"),
    ],
)
def test_other_ways_to_shard_are_refused(tmp_path, capsys, setting, message):
    assert main(["sft", *BASE[:4], "--out", str(tmp_path / "out"), "--trainer", setting]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
