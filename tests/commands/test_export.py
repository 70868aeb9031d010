"""`sharpen export`: from files of `sharpen sample` and `score`, and by hand, to TRL's shapes."""

import json
import sys

import pytest

from sharpen.cli import main

ROW = {
    "prompt_id": "p",
    "prompt": "q",
    "prompt_ids": [1, 5],
    "completions": ["a", "b", "", "d"],
    "completion_ids": [[6, 2], [7, 2], [2], [8]],
    "finish_reasons": ["stop", "stop", "stop", "length"],
    "logprobs": [[-1.0, -2.0], [-0.5, -0.25], [-0.1], [-0.1]],
    "rewards": {"logprob": [-3.0, -0.75, -0.1, -0.1], "mine": [2, 1.5, 9, 9]},
}


@pytest.fixture
def export(tmp_path, capsys):
    """Exit code, rows and messages of one export of some records."""

    def run(records, *flags, out="out.jsonl"):
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        code = main(["export", "--input", str(path), "--out", str(tmp_path / out), *flags])
        text = capsys.readouterr()
        rows = None
        if code == 0 and out.endswith(".jsonl"):
            rows = [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]
        return code, rows, text.out + text.err

    return run


def test_rewards_of_the_file_choose(export):
    _, rows, said = export([ROW], "--shape", "sft", "--reward", "mine")
    # the empty one and the one that was cut are never chosen
    assert [(row["completion"], row["reward"]) for row in rows] == [("a", 2.0)]
    assert "1 rows of 1 of 1 prompts" in said
    _, rows, _ = export([ROW], "--shape", "sft", "--reward", "logprob", out="b.jsonl")
    assert rows[0]["completion"] == "b"
    flags = ("--shape", "sft", "--reward", "mine", "--cut")
    _, rows, _ = export([ROW], *flags, out="c.jsonl")
    assert rows[0]["completion"] == "d"


@pytest.mark.parametrize(
    ("reward", "wanted"),
    [("mean_logprob", [-1.5, -0.375]), ("min_token", [-2.0, -0.5])],
)
def test_registered_rewards_follow_from_kept_log_probs(export, reward, wanted):
    _, rows, _ = export([ROW], "--shape", "sft", "--reward", reward, "--top", "2")
    assert {row["sample_id"]: row["reward"] for row in rows} == dict(enumerate(wanted))


def test_registered_rewards_follow_from_token_statistics(export):
    stats = {"entropy": [[1.0, 2.0], [3.0, 3.0], [0.0], [0.0]]}
    _, rows, _ = export(
        [ROW | {"token_stats": stats}], "--shape", "sft", "--reward", "neg_entropy", "--top", "2"
    )
    assert {row["sample_id"]: row["reward"] for row in rows} == {0: -1.5, 1: -3.0}


SINGLES = [
    {"prompt": "q", "completion": "a", "rewards": {"mine": 1}},
    {"prompt": "other", "completion": "x", "rewards": {"mine": 5}},
    {"prompt": "q", "completion": "b", "rewards": {"mine": 3}},
    {"prompt": "q", "completion": "c", "rewards": {"mine": None}},
]


def test_single_completions_of_a_prompt_are_put_together(export):
    _, rows, _ = export(SINGLES, "--shape", "dpo", "--reward", "mine")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("b", "a")]
    _, rows, _ = export(SINGLES, "--shape", "sft", "--reward", "mine", out="b.jsonl")
    assert [row["completion"] for row in rows] == ["b", "x"]
    _, rows, _ = export(SINGLES, "--shape", "prompt", out="c.jsonl")
    assert [row["prompt"] for row in rows] == ["q", "other"]


def test_every_shape_has_the_fields_of_its_trainer(export):
    fields = {
        "sft": {"prompt", "completion"},
        "dpo": {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"},
        "kto": {"prompt", "completion", "label"},
        "prompt": {"prompt"},
        "tokens": {"input_ids", "completion_mask"},
    }
    for shape, wanted in fields.items():
        flags = [] if shape == "prompt" else ["--reward", "mine"]
        flags += ["--share", "0.5"] if shape == "kto" else []
        code, rows, said = export([ROW], "--shape", shape, *flags, out=f"{shape}.jsonl")
        assert code == 0, said
        assert wanted <= rows[0].keys()


MESSAGES = [{"role": "user", "content": "q"}]


def test_messages_come_back_from_the_prompts_file(export, tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text(json.dumps({"prompt_id": "p", "prompt": MESSAGES}) + "\n")
    flags = ["--shape", "dpo", "--reward", "mine", "--prompts", str(source)]
    _, rows, _ = export([ROW | {"prompt": "<user>q"}], *flags)
    assert rows[0]["prompt"] == MESSAGES
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "a"}]
    code, _, said = export([ROW | {"prompt_id": "z"}], *flags, out="b.jsonl")
    assert (code, "`prompt_id` 'z' must be in" in said) == (2, True)


def test_the_same_command_writes_the_same_bytes_and_another_is_refused(export, tmp_path):
    flags = ["--shape", "dpo", "--reward", "mine", "--pairs", "random", "--seed", "3"]
    rows = [ROW | {"prompt_id": str(i)} for i in range(5)]
    assert export(rows, *flags)[0] == 0
    first = (tmp_path / "out.jsonl").read_bytes()
    assert export(rows, *flags)[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() == first
    code, _, said = export(rows, *flags, "--margin", "0.1")
    assert (code, "margin was 0.0, is 0.1" in said) == (2, True)
    assert (tmp_path / "out.jsonl").read_bytes() == first


SFT = ["--shape", "sft", "--reward", "mine"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "sft"], "`reward` must be given with `--shape sft`, got none"),
        ([*SFT, "--margin", "1"], "`margin` must be left out with `--shape sft`"),
        (["--shape", "prompt", "--reward", "mine"], "`reward` must be left out with"),
        ([*SFT, "--top", "0"], "`top` must be at least 1, got 0"),
        (["--shape", "dpo", "--reward", "mine", "--margin", "-1"], "`margin` must be at least 0"),
        (["--shape", "dpo", "--reward", "mine", "--margin", "9"], "at least one row of shape dpo"),
        (["--shape", "dpo", "--reward", "mine", "--seed", "1"], "`seed` must be left out"),
        (["--shape", "kto", "--reward", "mine"], "give one of `--threshold` and `--share`"),
        (
            ["--shape", "kto", "--reward", "mine", "--share", "0.1", "--threshold", "1"],
            "give one of `--threshold` and `--share` with `--shape kto`, got both",
        ),
        (["--shape", "kto", "--reward", "mine", "--share", "0.6"], "`share` must be above 0"),
        (["--shape", "kto", "--reward", "mine", "--threshold", "nan"], "`threshold` must be"),
        ([*SFT[:3], "typo"], "`reward` 'typo' must be among its rewards (logprob, mine)"),
        ([*SFT[:3], "neg_entropy"], "run `sharpen score --rewards neg_entropy` first"),
        ([*SFT[:3], "majority"], "in.jsonl:1: `reward` 'majority' must be among"),
    ],
    ids=lambda x: " ".join(x[2:]) if isinstance(x, list) else "",
)
def test_bad_options_are_refused(export, flags, message):
    code, _, said = export([ROW], *flags)
    assert code == 2
    assert message in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": {"mine": [1.0]}}, "`rewards.mine` must be a list of 4 entries, one a"),
        ({"rewards": {"mine": ["x", 1, 2, 3]}}, "`rewards.mine` must hold numbers or null"),
        ({"finish_reasons": ["stop"]}, "`finish_reasons` must be a list of 4 entries"),
        ({"completion_ids": [["x"]] * 4}, "`completion_ids` must be a list of integers"),
        ({"completions": "a"}, "`completions` must be a list, got str"),
        ({"completion": "a"}, "must have one of `completion` and `completions`, got both"),
        ({"rewards": None, "logprobs": [[0.0], ["x"], [], []]}, "must be among"),
        ({"prompt": ""}, "`prompt` must not be empty"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_records_are_told_by_place(export, change, message):
    code, _, said = export([ROW, ROW | {"prompt_id": "second"} | change], *SFT)
    assert code == 2
    assert "in.jsonl:2: " in said
    assert message in said


def test_bad_log_probs_are_told_by_place(export):
    bad = {"logprobs": [[0.0], ["x"], [0.0], [0.0]]}
    code, _, said = export([ROW | bad], "--shape", "sft", "--reward", "mean_logprob")
    assert (code, "in.jsonl:1: `logprob` must hold a list for each" in said) == (2, True)


def test_prompts_of_two_forms_are_refused(export):
    rows = [ROW, ROW | {"prompt": MESSAGES, "prompt_id": "m"}]
    code, _, said = export(rows, *SFT)
    assert (code, "in.jsonl:2: prompts must all be text or all messages" in said) == (2, True)


def test_files_are_told_from_each_other(export, monkeypatch):
    assert "`out` must be another file than `input`" in export([ROW], *SFT, out="in.jsonl")[2]
    code, _, said = export([ROW], *SFT, out="out.csv")
    assert (code, "`out` must end in .jsonl or .parquet" in said) == (2, True)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, _, said = export([ROW], *SFT, out="out.parquet")
    assert (code, 'run `pip install "sharpen[data]"`, or write .jsonl' in said) == (2, True)


def test_from_samples_to_scores_to_pairs(tmp_path):
    samples, scored, out = (tmp_path / f"{x}.jsonl" for x in ("samples", "scored", "pairs"))
    run = ["--model", "game24", "--device", "cpu", "--max-tokens", "400"]
    sample = ["sample", *run, "--task", "game24", "--limit", "3", "-n", "4", "--out", str(samples)]
    assert main([*sample, "--max-new-tokens", "40"]) == 0
    score = ["score", *run, "--input", str(samples), "--out", str(scored)]
    assert main([*score, "--rewards", "self_certainty", "logprob"]) == 0
    export = ["export", "--input", str(scored), "--shape", "dpo", "--reward", "self_certainty"]
    assert main([*export, "--out", str(out)]) == 0
    kept = {row["prompt_id"]: row for row in map(json.loads, scored.read_text().splitlines())}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows
    for row in rows:
        source = kept[row["prompt_id"]]
        able = [
            (reward, -g)
            for g, reward in enumerate(source["rewards"]["self_certainty"])
            if source["finish_reasons"][g] == "stop"
        ]
        assert (row["score_chosen"], -row["chosen_sample_id"]) == max(able)
        assert row["score_rejected"] == min(able)[0] < row["score_chosen"]
        assert row["chosen"] == source["completions"][row["chosen_sample_id"]]
