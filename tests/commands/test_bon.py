import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset

from helpers.shipped import SMALL_RUN, bon, broken_model
from sharpen.cli import main
from sharpen.models import load_model, load_tokenizer
from sharpen.tasks import get_task

FILES = ["chosen.jsonl", "greedy.jsonl", "report.html", "samples.jsonl", "summary.json"]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small finished run that several tests read."""
    out = tmp_path_factory.mktemp("runs") / "bon"
    assert bon(out) == 0
    return out


def test_run_holds_every_file_and_ends_with_a_table_and_the_report(run, capsys):
    assert {p.name for p in run.iterdir() if not p.name.startswith(".")} >= set(FILES)
    assert bon(run) == 0
    out = capsys.readouterr().out
    assert "Best of N, logprob" in out
    assert "sampling route 'shared'\n" in out
    assert out.rstrip().endswith(str(run / "report.html"))


def test_summary_has_the_promised_keys(run):
    summary = json.loads((run / "summary.json").read_text())
    assert {k: summary[k] for k in ("task", "model", "n", "prompts", "seed", "reward")} == {
        "task": "game24",
        "model": "game24",
        "n": 8,
        "prompts": 6,
        "seed": 0,
        "reward": "logprob",
    }
    accuracy = summary["accuracy"]
    assert set(accuracy) == {"greedy", "sample", "pass_at_n", "best_of_n"}
    for reward in ("logprob", "mean_logprob", "majority"):
        assert list(accuracy["best_of_n"][reward]) == ["1", "5", "8"]
        assert set(summary["ci95"][reward]) == set(summary["lift_over_greedy_percent"][reward])
    assert list(summary["mean_logprob_of_chosen"]) == ["1", "5", "8"]
    assert set(summary["seconds"]) == {"sample", "score"}
    samples = rows(run / "samples.jsonl")
    n_tokens = sum(len(ids) for row in samples for ids in row["completion_ids"])
    assert summary["tokens"] == {"sampled": n_tokens, "scored": n_tokens}


def test_chosen_is_the_most_probable_finished_sample_and_its_grade_is_true(run):
    task = get_task("game24")
    examples = {example.id: example for example in task.examples("test")}
    samples = {row["prompt_id"]: row for row in rows(run / "samples.jsonl")}
    chosen = rows(run / "chosen.jsonl")
    assert [row["prompt_id"] for row in chosen] == list(examples)[:6]
    for row in chosen:
        drawn = samples[row["prompt_id"]]
        sums = [sum(logprobs) for logprobs in drawn["logprobs"]]
        finished = [i for i, why in enumerate(drawn["finish_reasons"]) if why == "stop"]
        best = max(finished, key=sums.__getitem__)
        assert row["completion_ids"] == drawn["completion_ids"][best]
        assert row["completion"] == drawn["completions"][best]
        assert row["reward"] == pytest.approx(sums[best], abs=1e-4)
        assert row["correct"] == task.is_correct(examples[row["prompt_id"]], row["completion"])
    summary = json.loads((run / "summary.json").read_text())
    accuracy = summary["accuracy"]["best_of_n"]["logprob"]["8"]
    assert accuracy == pytest.approx(sum(row["correct"] for row in chosen) / 6, abs=1e-4)


def test_records_load_with_datasets(run, tmp_path):
    for name in ("samples.jsonl", "chosen.jsonl"):
        table = load_dataset(
            "json", data_files=str(run / name), split="train", cache_dir=str(tmp_path)
        )
        assert len(table) == 6
        assert {"prompt", "prompt_id"} <= set(table.column_names)
    assert "completion" in table.column_names


def test_scoring_by_forward_agrees_with_the_samplers_log_probs(run, tmp_path, capsys):
    assert bon(tmp_path / "run", "--scores", "scorer") == 0
    assert "sampling route 'shared', scoring route 'tree'\n" in capsys.readouterr().out
    exact = rows(tmp_path / "run" / "chosen.jsonl")
    for row, want in zip(exact, rows(run / "chosen.jsonl"), strict=True):
        assert row["completion"] == want["completion"]
        assert row["reward"] == pytest.approx(want["reward"], abs=1e-4)
    scores = rows(tmp_path / "run" / "scores.jsonl")
    for row, drawn in zip(scores, rows(run / "samples.jsonl"), strict=True):
        flat = [x for logprobs in row["logprob"] for x in logprobs]
        assert flat == pytest.approx([x for lp in drawn["logprobs"] for x in lp], abs=2e-5)


def mass_of_answer(row, drawn):
    """Log of the summed probability of the distinct finished samples that answer as the chosen."""
    task = get_task("game24")
    example = task.examples("test")[0]
    finished = [i for i, why in enumerate(drawn["finish_reasons"]) if why == "stop"]
    answer = {i: task.answer(example, drawn["completions"][i]) for i in finished}
    distinct = {
        tuple(drawn["completion_ids"][i]): math.exp(sum(drawn["logprobs"][i]))
        for i in finished
        if answer[i] == answer[row["sample_id"]]
    }
    return math.log(sum(distinct.values()))


@pytest.mark.parametrize("reward", ["mean_logprob", "majority", "rpc", "confidence_tail"])
def test_other_rewards_choose_by_themselves(tmp_path, reward):
    extra = ["--scores", "scorer"] if reward == "confidence_tail" else []
    assert bon(tmp_path / "run", "--reward", reward, *extra) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reward"] == reward
    assert "8" in summary["accuracy"]["best_of_n"][reward]
    if reward == "rpc":
        for row, drawn in zip(*(rows(tmp_path / "run" / f) for f in FILES[::3]), strict=True):
            assert mass_of_answer(row, drawn) == pytest.approx(row["reward"], abs=1e-4)
    if reward == "majority":
        samples = rows(tmp_path / "run" / "samples.jsonl")
        task = get_task("game24")
        example = task.examples("test")[0]
        for row, drawn in zip(rows(tmp_path / "run" / "chosen.jsonl"), samples, strict=True):
            valid = [
                task.answer(example, text)
                for text, why in zip(drawn["completions"], drawn["finish_reasons"], strict=True)
                if why == "stop"
            ]
            most = max(Counter(answer for answer in valid if answer).values())
            assert row["reward"] == pytest.approx(most / len(valid), abs=1e-6)


def test_prompts_from_a_file_give_a_run_without_grades(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Numbers: 1 2 3 4 Target: 24\\n", "prompt_id": "mine"}\n')
    arguments = ["bon", "--model", "game24", "--prompts", str(prompts), "-n", "4"]
    assert main([*arguments, "--max-new-tokens", "40", "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["task"] is None
    assert summary["accuracy"] is None
    (row,) = rows(tmp_path / "run" / "chosen.jsonl")
    assert row["prompt_id"] == "mine"
    assert row["prompt"] == "Numbers: 1 2 3 4 Target: 24\n"
    assert row["correct"] is None


def test_messages_become_a_conversation_that_trl_reads(tmp_path):
    model, tokenizer = load_model("game24", device="cpu"), load_tokenizer("game24")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    messages = [{"role": "user", "content": "Numbers: 1 2 3 4 Target: 24\n"}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": messages}) + "\n")
    command = ["bon", "--model", str(tmp_path / "chat"), "--prompts", str(prompts), "-n", "4"]
    out = tmp_path / "run"
    assert main([*command, "--max-new-tokens", "40", "--device", "cpu", "--out", str(out)]) == 0
    (row,) = rows(out / "chosen.jsonl")
    assert row["prompt"] == messages
    (answer,) = row["completion"]
    assert answer["role"] == "assistant"
    (drawn,) = rows(out / "samples.jsonl")
    assert drawn["prompt"] == messages[0]["content"]
    assert answer["content"] == drawn["completions"][row["sample_id"]]


def test_a_prompt_whose_samples_were_all_cut_is_left_out(tmp_path):
    assert bon(tmp_path / "run", "--max-new-tokens", "3") == 0
    assert rows(tmp_path / "run" / "chosen.jsonl") == []
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy"]["best_of_n"]["logprob"]["8"] == 0
    assert summary["invalid_share"] == 1


def test_nan_logits_are_named_and_the_run_goes_on(tmp_path, caplog):
    prompts = tmp_path / "prompts.jsonl"
    texts = [f"Numbers: {n} 2 3 4 Target: 24\n" for n in (1, 13, 5)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    model = broken_model(tmp_path / "broken")
    command = ["bon", "--model", str(model), "--prompts", str(prompts), "--device", "cpu"]
    out = tmp_path / "run"
    assert main([*command, "-n", "4", "--max-new-tokens", "40", "--out", str(out)]) == 0
    assert f"{prompts}:2: the model's logits are NaN for 4 of 4 samples" in caplog.text
    assert rows(out / "samples.jsonl")[1]["finish_reasons"] == ["nan"] * 4
    assert {row["prompt"] for row in rows(out / "chosen.jsonl")} == {texts[0], texts[2]}


def test_other_settings_are_refused_with_the_difference(run, capsys):
    before = (run / "samples.jsonl").read_bytes()
    assert bon(run, "--seed", "1") == 2
    assert "seed was 0, is 1" in capsys.readouterr().err
    assert (run / "samples.jsonl").read_bytes() == before


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(run, tmp_path):
    out = tmp_path / "run"
    # a budget of one prompt a batch, so that there is something to kill between
    command = [sys.executable, "-m", "sharpen", *SMALL_RUN, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    kills = 0
    for wanted in (1, 3, 5):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if len(_lines(out / "samples.jsonl")) >= wanted:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
    assert kills == 3
    # what a crash in the middle of a write leaves behind
    with open(out / "samples.jsonl", "a") as file:
        file.write('{"prompt_id": "torn')
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    for name in ("samples.jsonl", "chosen.jsonl", "greedy.jsonl"):
        assert (out / name).read_bytes() == (run / name).read_bytes(), name


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []
