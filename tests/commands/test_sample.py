import json

import pytest

from sharpen.cli import main

SAMPLE = [
    "sample",
    "--model",
    "game24",
    "--task",
    "game24",
    "--split",
    "sharpen",
    "--limit",
    "4",
    "-n",
    "3",
    "--max-new-tokens",
    "40",
    "--device",
    "cpu",
]


def sample(out, *extra):
    assert main([*SAMPLE, "--out", str(out), *extra]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_records_are_whole_and_in_input_order(tmp_path):
    rows = sample(tmp_path / "a.jsonl")
    assert len(rows) == 4
    for row in rows:
        assert row["prompt"].startswith("Numbers: ")
        assert row["prompt_id"] == "game24-" + "-".join(row["prompt"].split()[1:5])
        assert len(row["completions"]) == len(row["finish_reasons"]) == 3
        for ids, logprobs in zip(row["completion_ids"], row["logprobs"], strict=True):
            assert len(ids) == len(logprobs) > 0
            assert max(logprobs) <= 0


def test_the_seed_decides(tmp_path):
    first, again = sample(tmp_path / "a.jsonl"), sample(tmp_path / "b.jsonl")
    assert first == again
    assert sample(tmp_path / "c.jsonl", "--seed", "1") != first


def test_torn_outputs_are_continued_to_the_same_bytes(tmp_path):
    out = tmp_path / "a.jsonl"
    one_prompt_a_batch = ["--max-tokens", "150"]
    sample(out, *one_prompt_a_batch)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in (b"", lines[0], lines[0] + lines[1][:20], b"".join(lines[:3])):
        out.write_bytes(kept)
        sample(out, *one_prompt_a_batch)
        assert out.read_bytes() == whole


def test_prompts_of_other_lengths_come_out_in_input_order(tmp_path):
    texts = ["Numbers: 1 2 3 4 5 6 7\n", "Numbers: 1\n", "Numbers: 1 2 3 4\n", "Numbers: 2\n"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    out = tmp_path / "out.jsonl"
    command = ["sample", "--model", "game24", "--prompts", str(path), "--out", str(out)]
    assert main([*command, "-n", "2", "--max-new-tokens", "5", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == texts


@pytest.mark.parametrize("shots", [0, 2])
def test_worked_examples_go_before_each_prompt(tmp_path, shots):
    rows = sample(tmp_path / "a.jsonl", "--shots", str(shots))
    assert all(row["prompt"].count("Target: 24") == shots + 1 for row in rows)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--sampler", "mh", "--alpha", "3", "--steps", "2"], {"accepted", "drawn", "read_again"}),
        (
            [
                "--sampler",
                "smc",
                "--alpha",
                "3",
                "--particles",
                "4",
                "--ramp",
                "5",
                "--resample-every",
                "3",
                "--resample-threshold",
                "0.9",
            ],
            {"particles", "log_z", "effective_size", "n_resampled"},
        ),
    ],
    ids=["mh", "smc"],
)
def test_the_power_distribution_is_sampled_and_continued(tmp_path, flags, told):
    out = tmp_path / "a.jsonl"
    # one prompt a batch
    command = [*flags, "--limit", "2", "--max-new-tokens", "10", "--max-tokens", "80"]
    rows = sample(out, *command)
    assert len(rows) == 2
    for row in rows:
        assert told < set(row)
        assert len(row["completions"]) == 3
        for ids, logprobs in zip(row["completion_ids"], row["logprobs"], strict=True):
            assert len(ids) == len(logprobs) > 0
    whole = out.read_bytes()
    first, second = whole.splitlines(keepends=True)
    out.write_bytes(first + second[:20])
    sample(out, *command)
    assert out.read_bytes() == whole
    # other settings are another run
    assert main([*SAMPLE, "--out", str(out), *command, "--proposal-temperature", "0.5"]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", "4"], "`--alpha` must come with `--sampler` mh or smc, got model"),
        (["--sampler", "mh", "--particles", "4"], "`--particles` must come with `--sampler` smc"),
        (["--resample-every", "4"], "`--resample-every` must come with `--sampler` smc, got model"),
        (
            ["--sampler", "mh", "--resample-threshold", "0.5"],
            "`--resample-threshold` must come with `--sampler` smc, got mh",
        ),
        (["--sampler", "smc", "--resample-every", "0"], "`every` must be at least 1, got 0"),
        (["--sampler", "smc", "--resample-threshold", "2"], "`threshold` must be in [0, 1], got 2"),
        (["--sampler", "mh", "--alpha", "0.5"], "`alpha` must be at least 1, got 0.5"),
        (["--sampler", "smc", "--temperature", "0.5"], "`temperature` must be 1 for a sampler of"),
        (["--sampler", "smc", "--particles", "999"], "`max_tokens` must hold 999 particles"),
    ],
)
def test_settings_of_another_sampler_are_refused(tmp_path, capsys, flags, message):
    assert main([*SAMPLE, "--out", str(tmp_path / "a.jsonl"), *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_resampling_is_as_often_as_asked_for(tmp_path):
    often = ["--sampler", "smc", "--particles", "6", "--limit", "2", "--resample-threshold"]
    counts = {}
    for threshold, every in ((0, 1), (1, 1), (1, 20)):
        out = tmp_path / f"{threshold}-{every}.jsonl"
        rows = sample(out, *often, str(threshold), "--resample-every", str(every))
        counts[threshold, every] = [row["n_resampled"] for row in rows]
    assert counts[0, 1] == [0, 0]
    assert min(counts[1, 1]) > 5
    assert max(counts[1, 20]) <= 2
