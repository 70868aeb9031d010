"""Exported files under `datasets` and under TRL's own trainers."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("trl")

from datasets import load_dataset

from sharpen.cli import main
from sharpen.records import write_rows
from test_layers import ROOT

SHAPES = {
    "sft": ["--reward", "logprob"],
    "tokens": ["--reward", "logprob", "--top", "2"],
    "dpo": ["--reward", "mean_logprob", "--pairs", "all"],
    "kto": ["--reward", "logprob", "--share", "0.5"],
    "prompt": [],
}
TEXT, NUMBER, COUNT = "Value('string')", "Value('float64')", "Value('int64')"
TURNS = "List({'content': Value('string'), 'role': Value('string')})"
IDS = "List(Value('int64'))"


def features(shape, said):
    """What `datasets` must find in a file; `said` is how text or turns are typed."""
    source = {"prompt_id": TEXT, "sample_id": COUNT, "reward": NUMBER}
    return {
        "sft": {"prompt": said, "completion": said, **source},
        "tokens": {"input_ids": IDS, "completion_mask": IDS, **source},
        "dpo": {
            "prompt": said,
            "chosen": said,
            "rejected": said,
            "score_chosen": NUMBER,
            "score_rejected": NUMBER,
            "prompt_id": TEXT,
            "chosen_sample_id": COUNT,
            "rejected_sample_id": COUNT,
        },
        "kto": {"prompt": said, "completion": said, "label": "Value('bool')", **source},
        "prompt": {"prompt": said, "prompt_id": TEXT},
    }[shape]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    samples, scored = folder / "samples.jsonl", folder / "scored.jsonl"
    run = ["--model", "game24", "--device", "cpu", "--max-tokens", "400"]
    sample = ["sample", *run, "--task", "game24", "--limit", "4", "-n", "6", "--out", str(samples)]
    assert main([*sample, "--max-new-tokens", "40"]) == 0
    rewards = ["--rewards", "logprob", "mean_logprob"]
    assert main(["score", *run, "--input", str(samples), "--out", str(scored), *rewards]) == 0
    return scored


def export(scored, folder, shape, suffix):
    out = folder / f"{shape}{suffix}"
    flags = ["--input", str(scored), "--shape", shape, "--out", str(out), *SHAPES[shape]]
    assert main(["export", *flags]) == 0
    return out


def loaded(path, folder):
    kind = "parquet" if path.suffix == ".parquet" else "json"
    return load_dataset(kind, data_files=str(path), split="train", cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("form", ["text", "messages"])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_files_have_the_features_of_the_shape(scored, tmp_path, shape, form):
    if form == "messages":
        rows = [json.loads(line) for line in scored.read_text().splitlines()]
        for row in rows:
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        scored = tmp_path / "messages.jsonl"
        write_rows(scored, rows)
    files = [export(scored, tmp_path, shape, suffix) for suffix in (".jsonl", ".parquet")]
    lines, table = (loaded(path, tmp_path) for path in files)
    wanted = features(shape, TEXT if form == "text" else TURNS)
    for found in (lines, table):
        kinds = {name: str(kind) for name, kind in found.features.items()}
        # the order of a struct's fields is that of the file
        kinds = {
            name: TURNS if "'role'" in kind and "'content'" in kind else kind
            for name, kind in kinds.items()
        }
        assert kinds == wanted
    assert lines.to_list() == table.to_list()
    assert len(lines) > 0
    # the same rows make the same bytes
    again = tmp_path / "again"
    again.mkdir()
    assert export(scored, again, shape, ".parquet").read_bytes() == files[1].read_bytes()


def test_trl_takes_two_steps_on_each(scored, tmp_path):
    files = {
        "sft": export(scored, tmp_path, "sft", ".jsonl"),
        "tokens": export(scored, tmp_path, "tokens", ".parquet"),
        "dpo": export(scored, tmp_path, "dpo", ".parquet"),
        "kto": export(scored, tmp_path, "kto", ".jsonl"),
        "grpo": export(scored, tmp_path, "prompt", ".parquet"),
    }
    named = [f"{trainer}={path}" for trainer, path in files.items()]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    script = ROOT / "tests" / "workers" / "trl_two_steps.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "trl"), *named],
        text=True,
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == list(files)
    for trainer, seen in found.items():
        assert len(seen["losses"]) == 2, trainer
        # the loss of GRPO's first steps may be nought
        assert seen["moved"] or trainer == "grpo", trainer
    kept = {row["prompt_id"]: row for row in map(json.loads, scored.read_text().splitlines())}
    rows = loaded(files["tokens"], tmp_path)
    read = found["tokens"]["read"]
    assert read["input_ids"] == list(rows["input_ids"])
    for row, labels in zip(rows, read["labels"], strict=True):
        source = kept[row["prompt_id"]]
        completion = source["completion_ids"][row["sample_id"]]
        assert labels == [-100] * len(source["prompt_ids"]) + completion
    pairs = loaded(files["dpo"], tmp_path)
    for row, chosen in zip(pairs, found["dpo"]["read"]["chosen_ids"], strict=True):
        assert chosen == kept[row["prompt_id"]]["completion_ids"][row["chosen_sample_id"]]
