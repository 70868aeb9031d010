"""vLLM for CPUs, in its own environment (`make vllm`): samples and log-probs beside ours."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.other_pythons import code_block, python_of, run
from helpers.vllm_llama import CPU, save_llama

DRAW = ["--task", "game24", "--limit", "6", "--max-new-tokens", "24", "--dtype", "float32"]


@pytest.fixture(scope="module")
def vllm_python():
    return python_of(".venv-vllm", "SHARPEN_VLLM_PYTHON", "run `make vllm`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def samples(vllm_python, folder, tmp_path_factory):
    """The page's command: drawn at temperature 0.7, as log-probs must be raw."""
    out = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    flags = ["--temperature", "0.7", "-n", "8", "--out", str(out)]
    run(
        vllm_python,
        "-m",
        "sharpen",
        "sample",
        "--engine",
        "vllm",
        "--model",
        str(folder),
        *DRAW,
        *flags,
        **CPU,
    )
    return out


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_are_whole_and_not_those_of_a_checkpoints_defaults(samples):
    rows = rows_of(samples)
    assert len(rows) == 6
    reasons = {reason for row in rows for reason in row["finish_reasons"]}
    assert "length" in reasons
    distinct = set()
    for row in rows:
        for ids, logprobs in zip(row["completion_ids"], row["logprobs"], strict=True):
            assert len(ids) == len(logprobs) > 0
            distinct |= set(ids)
        assert len({tuple(ids) for ids in row["completion_ids"]}) == 8
    # top-k of 2 would leave far fewer
    assert len(distinct) > 60


def parity(python, folder, samples, out, *flags, **environment):
    run(
        python,
        "-m",
        "sharpen",
        "parity",
        "--model",
        str(folder),
        "--samples",
        str(samples),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--tolerance",
        "1e-4",
        "--out",
        str(out),
        *flags,
        **environment,
    )
    return json.loads(out.read_text())


def test_the_samplers_log_probs_are_our_scorers(vllm_python, folder, samples, tmp_path):
    report = parity(vllm_python, folder, samples, tmp_path / "a.json", "--against", "sampler")
    assert report["differences"]["max"] <= 1e-4
    assert report["differences"]["n_tokens"] > 500


def test_vllms_scoring_is_our_scorers(vllm_python, folder, samples, tmp_path):
    report = parity(vllm_python, folder, samples, tmp_path / "b.json", "--against", "vllm", **CPU)
    assert report["differences"]["max"] <= 1e-4


BON = """
import json, sys
from pathlib import Path
from sharpen.sampling import Prompt, SamplingConfig
from sharpen.sampling.vllm_engine import VllmEngine

if __name__ == "__main__":
    engine = VllmEngine(sys.argv[1], dtype="float32", options={"max_model_len": 128})
    prompts = [Prompt(f"p{i}", "", (1, 5, 6 + i), f"p{i}") for i in range(5)]
    config = SamplingConfig(n=6, max_new_tokens=10, seed=3)
    first = [s for part in engine.sample(prompts, config, done={"p2"}) for s in part]
    again = [s for part in engine.sample(prompts, config) for s in part]
    tail = SamplingConfig(n=2, max_new_tokens=10, seed=3, first=4)
    last = [s for part in engine.sample(prompts, tail) for s in part]
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=10)
    best = [s for part in engine.sample(prompts, greedy) for s in part]
    told = []
    for prompt in (Prompt("e", "", (), "empty"), Prompt("l", "", (1,) * 125, "long")):
        try:
            engine.check([prompt], config)
        except ValueError as error:
            told.append(str(error))
    engine.close()
    Path(sys.argv[2]).write_text(json.dumps({
        "first": {s.prompt_id: s.completion_ids for s in first},
        "again": {s.prompt_id: s.completion_ids for s in again},
        "last": {s.prompt_id: s.completion_ids for s in last},
        "best": {s.prompt_id: [s.completion_ids, s.logprobs] for s in best},
        "told": told,
    }))
"""


def test_a_sample_depends_on_prompt_index_and_seed(vllm_python, folder, tmp_path):
    script, out = tmp_path / "draw.py", tmp_path / "out.json"
    script.write_text(BON)
    run(vllm_python, script, folder, out, **CPU)
    found = json.loads(out.read_text())
    assert sorted(found["first"]) == ["p0", "p1", "p3", "p4"]
    for name, ids in found["first"].items():
        # in another batch; near-ties could flip a draw, not most of them
        same = [a == b for a, b in zip(ids, found["again"][name], strict=True)]
        assert sum(same) >= 5
    matched = [
        a == b
        for p, ids in found["last"].items()
        for a, b in zip(ids, found["again"][p][4:], strict=True)
    ]
    assert sum(matched) >= 8
    # greedy is what our own sampler's model finds most probable
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for i in range(5):
        (ids,), (logprobs,) = found["best"][f"p{i}"]
        with torch.no_grad():
            logits = model(torch.tensor([[1, 5, 6 + i, *ids]])).logits[0, 2:-1]
        best = logits.log_softmax(1).max(1)
        assert best.indices.tolist() == ids
        assert best.values.tolist() == pytest.approx(logprobs, abs=1e-4)
    assert "empty: a prompt of 0 tokens + 10 must be at least one" in found["told"][0]
    assert "long: a prompt of 125 tokens + 10" in found["told"][1]
    assert "fit vLLM's context of 128" in found["told"][1]


def test_the_page_runs(vllm_python, folder, tmp_path):
    script = tmp_path / "page.py"
    script.write_text(f"FOLDER = {str(folder)!r}\n" + code_block("vllm.md"))
    kept, rescored = map(float, run(vllm_python, script, **CPU).split()[-2:])
    # sums of at most 16 tokens
    assert max(kept, rescored) <= 1e-3
