import json
import math

import pytest
import torch

from helpers.shipped import broken_model
from sharpen.cli import main
from sharpen.models import load_model, load_tokenizer
from sharpen.scoring.rewards import REWARDS, options_needed

PROMPT = "Numbers: 1 2 3 4 Target: 24\n"
TRACE = "4 * 3 = 12 left: 1 2 12\n12 * 2 = 24 left: 1 24\n24 * 1 = 24"


def score(tmp_path, rows, *extra, model="game24"):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    arguments = ["--model", str(model), "--input", str(tmp_path / "in.jsonl"), "--out", str(out)]
    code = main(["score", *arguments, "--device", "cpu", *extra])
    return code, [json.loads(line) for line in out.read_text().splitlines()]


def by_hand(prompt, completion_ids, temperature=1.0):
    model, tokenizer = load_model("game24", device="cpu"), load_tokenizer("game24")
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([prompt_ids + completion_ids])
    with torch.no_grad():
        logprob = (model(ids).logits[0, :-1].double() / temperature).log_softmax(1)
    return logprob.gather(1, ids[0, 1:, None]).squeeze(1)[len(prompt_ids) - 1 :]


def test_text_and_ids_single_and_grouped(tmp_path):
    tokenizer = load_tokenizer("game24")
    ids = tokenizer(TRACE, add_special_tokens=False)["input_ids"]
    rows = [
        {"prompt": PROMPT, "completion": TRACE, "note": "kept"},
        {"prompt": PROMPT, "completions": [TRACE, "", "4 * 3"]},
        {"prompt": PROMPT, "completion": "ignored text", "completion_ids": [*ids, 2]},
        {"prompt": PROMPT, "completion": [{"role": "assistant", "content": TRACE}]},
    ]
    code, scored = score(tmp_path, rows)
    assert code == 0
    want = by_hand(PROMPT, ids).sum().item()
    assert scored[0]["rewards"]["logprob"] == pytest.approx(want, abs=1e-4)
    assert scored[0]["rewards"]["mean_logprob"] == pytest.approx(want / len(ids), abs=1e-5)
    assert scored[0]["note"] == "kept"
    assert scored[1]["rewards"]["logprob"][0] == pytest.approx(want, abs=1e-4)
    assert scored[1]["rewards"]["logprob"][1] == 0
    assert scored[1]["n_tokens"] == [len(ids), 0, 3]
    with_end = by_hand(PROMPT, [*ids, 2]).sum().item()
    assert scored[2]["rewards"]["logprob"] == pytest.approx(with_end, abs=1e-4)
    assert scored[3]["rewards"] == scored[0]["rewards"]


def test_end_of_sequence_is_scored_when_asked_for(tmp_path):
    code, (row,) = score(tmp_path, [{"prompt": PROMPT, "completion": TRACE}], "--add-eos", "true")
    ids = load_tokenizer("game24")(TRACE, add_special_tokens=False)["input_ids"]
    assert code == 0
    want = by_hand(PROMPT, [*ids, 2]).sum().item()
    assert row["rewards"]["logprob"] == pytest.approx(want, abs=1e-4)


def test_scores_are_of_the_temperature_asked_for(tmp_path, capsys):
    ids = load_tokenizer("game24")(TRACE, add_special_tokens=False)["input_ids"]
    rows = [{"prompt": PROMPT, "completion": TRACE}]
    code, (row,) = score(tmp_path, rows, "--temperature", "0.5")
    assert code == 0
    want = by_hand(PROMPT, ids, 0.5).sum().item()
    assert row["rewards"]["logprob"] == pytest.approx(want, abs=1e-4)
    # the same output of another law is not gone on with
    assert (
        main(
            [
                "score",
                "--model",
                "game24",
                "--input",
                str(tmp_path / "in.jsonl"),
                "--out",
                str(tmp_path / "out.jsonl"),
                "--device",
                "cpu",
            ]
        )
        == 2
    )
    assert "temperature was 0.5, is 1.0" in capsys.readouterr().err


def test_token_statistics_on_request(tmp_path):
    rows = [{"prompt": PROMPT, "completions": [TRACE, "4 * 3"]}]
    extra = ["--rewards", "logprob", "neg_entropy", "--token-stats", "true"]
    _, (row,) = score(tmp_path, rows, *extra)
    stats = row["token_stats"]
    assert set(stats) == {"logprob", "entropy"}
    assert [len(x) for x in stats["logprob"]] == row["n_tokens"]
    assert sum(stats["logprob"][1]) == pytest.approx(row["rewards"]["logprob"][1], abs=1e-5)
    mean = sum(stats["entropy"][0]) / row["n_tokens"][0]
    assert -mean == pytest.approx(row["rewards"]["neg_entropy"][0], abs=1e-5)


def test_every_reward_without_options(tmp_path):
    names = [name for name in REWARDS if not options_needed(name)]
    code, (row,) = score(tmp_path, [{"prompt": PROMPT, "completion": TRACE}], "--rewards", *names)
    assert code == 0
    ids = load_tokenizer("game24")(TRACE, add_special_tokens=False)["input_ids"]
    logprob = by_hand(PROMPT, ids)
    assert set(row["rewards"]) == set(names)
    assert row["rewards"]["min_token"] == pytest.approx(logprob.min().item(), abs=1e-4)
    assert -row["rewards"]["neg_perplexity"] == pytest.approx(math.exp(-logprob.mean()), abs=1e-4)
    lowest, bottom, mean = (row["rewards"][f"confidence{x}"] for x in ("_lowest", "_bottom", ""))
    assert 0 < lowest <= bottom < mean


@pytest.mark.parametrize("reward", ["majority", "rpc"])
def test_votes_need_answers_that_records_do_not_have(reward, tmp_path, capsys):
    arguments = ["--model", "game24", "--input", "in.jsonl", "--out", str(tmp_path / "out.jsonl")]
    assert main(["score", *arguments, "--rewards", "logprob", reward]) != 0
    assert f"`rewards` {reward} needs answers" in capsys.readouterr().err


def test_a_torn_output_is_continued_to_the_same_bytes(tmp_path):
    rows = [{"prompt": PROMPT, "completion": f"{i} + 1 = {i + 1}"} for i in range(70)]
    score(tmp_path, rows)
    whole = (tmp_path / "out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    # scored and written 32 at a time
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:32]) + lines[32][:9])
    code, _ = score(tmp_path, rows)
    assert code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_nan_is_null_named_and_alone(tmp_path, caplog):
    rows = [{"prompt": PROMPT, "completion": f"{i} + 1"} for i in (5, 13, 6)]
    code, scored = score(tmp_path, rows, model=broken_model(tmp_path / "broken"))
    assert code == 0
    assert [row["rewards"]["logprob"] is None for row in scored] == [False, True, False]
    assert "in.jsonl:2: the model's logits are NaN" in caplog.text
