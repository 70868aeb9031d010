import json

import pytest

from sharpen.cli import main

SAMPLE = [
    "sample", "--model", "game24", "--task", "game24", "--split", "sharpen", "--limit", "4",
    "-n", "3", "--max-new-tokens", "40", "--device", "cpu",
]  # fmt: skip


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
