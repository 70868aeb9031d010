"""What `fit` leaves of a run of two processes that was killed, beside that of one."""

import json

import pytest
from transformers import AutoModelForCausalLM

from workers.training_two_ranks import CASES, ENDS, keep, start, weights


def assert_kept_as_by_one(folder, name, changes):
    """Weights and losses of `folder / name`, killed and begun again, are those of one process."""
    one = folder / f"{name}-of-one"
    keep(one, 1, **changes)
    want, got = (
        weights(AutoModelForCausalLM.from_pretrained(out / "model")) for out in (one, folder / name)
    )
    moved = (want - weights(start(CASES["whole"]))).norm()
    assert moved > 1e-4
    assert (got - want).norm() < 1e-4 * moved
    rows = [
        [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
        for out in (one, folder / name)
    ]
    assert [row["step"] for row in rows[1]] == [1, 2]
    assert [row["loss"] for row in rows[1]] == pytest.approx(
        [row["loss"] for row in rows[0]], rel=1e-4
    )
    for file in ("config.json", "generation_config.json"):
        said = [json.loads((run / "model" / file).read_text()) for run in (one, folder / name)]
        assert said[0] == said[1]
    # of the model that was given, not of its configuration
    assert said[1]["eos_token_id"] == ENDS
    assert not list((folder / name).glob(".model*"))
