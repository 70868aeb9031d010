"""Journals of scores: a crash in the middle of a chunk changes no bit of it."""

import json

import pytest

from sharpen.commands.stages import CHUNK, score_samples
from sharpen.runs import Journal
from sharpen.scoring import Scores

N = 2 * CHUNK + 3
SAMPLES = [
    {
        "prompt_id": f"p{p}",
        "prompt_ids": [p],
        "completion_ids": [[p, 1], [2]],
        "finish_reasons": ["stop", "length"],
    }
    for p in range(N)
]


class ByBatch:
    """A scorer whose numbers depend on the batch, as the last bits of any do."""

    def __init__(self):
        self.batches = []

    def score(self, prompts, completions, *, stats):
        self.batches.append([ids[0] for ids in prompts])
        first = self.batches[-1][0]
        return Scores.from_logprobs(
            [[[-float(first)] * len(ids) for ids in group] for group in completions]
        )


def score(path, scorer):
    stages = score_samples.__wrapped__  # the scorer here is a stand-in
    return stages(path, scorer, SAMPLES, ("logprob",), Journal(path.with_name("timings.jsonl")))


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "whole.jsonl"
    return path, score(path, ByBatch())


@pytest.mark.parametrize("n", [0, 1, CHUNK - 1, CHUNK, CHUNK + 5, 2 * CHUNK, N - 1, N])
def test_what_is_left_is_scored_in_the_same_batches(tmp_path, whole, n):
    lines = whole[0].read_text().splitlines(keepends=True)
    assert len(lines) == N
    path, scorer = tmp_path / "cut.jsonl", ByBatch()
    # n whole lines, and one that was torn
    path.write_text("".join(lines[:n]) + (lines[n][:-9] if n < N else ""))
    scores = score(path, scorer)
    assert path.read_bytes() == whole[0].read_bytes()
    assert scores.reward("logprob").tolist() == whole[1].reward("logprob").tolist()
    started = [batch[0] for batch in scorer.batches]
    assert started == ([] if n == N else list(range(n - n % CHUNK, N, CHUNK)))
    assert json.loads(lines[CHUNK])["prompt_id"] == f"p{CHUNK}"
