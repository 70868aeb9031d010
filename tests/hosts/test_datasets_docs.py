"""docs/hosts/datasets.md does what it says."""

import pytest

pytest.importorskip("trl")

from helpers.documented import blocks, ran


def test_the_page_runs(tmp_path):
    page = "docs/hosts/datasets.md"
    (shell,), (python,) = blocks(page, "bash"), blocks(page, "python")
    done = ran(shell, "bash", tmp_path)
    assert done.returncode == 0, done.stderr
    made = {path.name for path in tmp_path.iterdir() if path.suffix in (".jsonl", ".parquet")}
    assert made >= {"sft.jsonl", "dpo.parquet", "kto.parquet", "tokens.parquet", "prompts.jsonl"}
    again = ran(python, "python", tmp_path)
    assert again.returncode == 0, again.stderr
    assert "'score_chosen': Value('float64')" in again.stdout
