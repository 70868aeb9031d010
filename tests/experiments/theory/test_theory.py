""""""

import json
import math
import shutil
import time

import pytest

from helpers.shipped import broken_model
from sharpen.cli import main
from sharpen.scoring import Scorer

SMALL = ["theory", "--model", "game24", "--max-new-tokens", "48", "--device", "cpu"]
# the first three test puzzles, from a file: to list all puzzles takes longer than to search these
PUZZLES = ["1 9 11 13", "1 5 11 12", "1 2 6 7"]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The command on three puzzles, but for its output."""
    path = tmp_path_factory.mktemp("prompts") / "puzzles.jsonl"
    prompts = [f"Numbers: {numbers} Target: 24\n" for numbers in PUZZLES]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return [*SMALL, "--prompts", str(path)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, small):
    out = tmp_path_factory.mktemp("runs") / "theory"
    assert main([*small, "--out", str(out), "--policy", "game24"]) == 0
    return out


def test_every_y_star_is_proved_and_scored(run):
    modes = rows(run / "modes.jsonl")
    assert len(modes) == 3
    assert all(row["proved"] and row["complete"] for row in modes)
    scorer = Scorer("game24", device="cpu")
    for row in modes:
        prompt = scorer.tokenizer(row["prompt"])["input_ids"]
        scores = scorer.score([prompt], [[row["completion_ids"]]])
        assert row["logprob"] == pytest.approx(scores.reward("logprob").item(), abs=1e-4)
        assert row["completion"].endswith("= 24")
        assert row["bound"] < row["logprob"]


def test_theory_json_is_of_these_rows(run, capsys):
    theory = json.loads((run / "theory.json").read_text())
    modes = rows(run / "modes.jsonl")
    want = sum(math.exp(-row["logprob"]) for row in modes) / 3
    assert theory["coverage"]["c_cov"] == pytest.approx([want, want])
    greedy = [row["completion_ids"][0] for row in rows(run / "greedy.jsonl")]
    found = sum(ids == row["completion_ids"] for ids, row in zip(greedy, modes, strict=True))
    assert theory["greedy"]["n_found"] == found
    # judged by itself, the base model has the same mass on y*
    mean = sum(row["logprob"] for row in modes) / 3
    assert theory["policy"]["logprob_mean"] == pytest.approx(mean, abs=1e-5)
    assert theory["n_nothing_ended"] == 0


def test_a_killed_run_goes_on_and_ends_with_the_same_files(run, small, tmp_path, capsys):
    out = tmp_path / "again"
    shutil.copytree(run, out)
    whole = (out / "modes.jsonl").read_bytes()
    first, second, _ = whole.splitlines(keepends=True)
    # killed in the third line
    (out / "modes.jsonl").write_bytes(first + second + b'{"prompt_id": "game')
    judged = (out / "policy.jsonl").read_bytes()
    (out / "policy.jsonl").write_bytes(judged[: judged.index(b"\n") + 5])
    (out / "theory.json").unlink()
    started = time.monotonic()
    assert main([*small, "--out", str(out), "--policy", "game24"]) == 0
    assert (out / "modes.jsonl").read_bytes() == whole
    assert len(judged.splitlines()) == 3
    assert (out / "policy.jsonl").read_bytes() == judged
    # one prompt was searched again
    seconds = [row["seconds"] for row in rows(out / "timings.jsonl") if row["stage"] == "search"]
    assert len(seconds) == 4
    assert 0 < seconds[-1] < time.monotonic() - started
    assert json.loads((out / "theory.json").read_text()) == json.loads(
        (run / "theory.json").read_text()
    )
    assert "C_cov = E[1/pi(y*)]" in capsys.readouterr().out


def test_a_small_budget_is_said_to_prove_nothing(small, tmp_path, capsys):
    out = tmp_path / "short"
    assert main([*small, "--max-expansions", "26", "--out", str(out)]) == 0
    modes = rows(out / "modes.jsonl")
    n_proved = sum(row["proved"] for row in modes)
    assert n_proved < 3
    assert not any(row["complete"] for row in modes)
    assert max(row["n_expanded"] for row in modes) <= 26
    assert f"proved            {n_proved} of 3" in capsys.readouterr().out
    low, high = json.loads((out / "theory.json").read_text())["coverage"]["c_cov"]
    assert low < high


def test_a_model_of_nan_is_refused(small, tmp_path, capsys):
    # the first test puzzle holds a 13
    model, out = str(broken_model(tmp_path / "model")), str(tmp_path / "out")
    assert main([*small, "--model", model, "--limit", "1", "--out", out]) == 2
    assert "must end some completion within 48 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--gamma", "1"], "`gamma` must be in [0, 1), got 1.0"),
        (["--deltas", "0.1", "2"], "`deltas` must be in (0, 1), got 2.0"),
        (["--max-expansions", "0"], "`max_expansions` must be at least 1"),
        (["--max-new-tokens", "1024"], "must fit the model's context of 1024"),
        (["--policy", "./no/such"], "where no such folder exists"),
    ],
)
def test_bad_options_write_nothing(extra, message, small, tmp_path, capsys):
    assert main([*small, "--out", str(tmp_path / "out"), *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["lower-bound", "linear-softmax", "error-shape"])
def test_a_study_writes_rows_table_and_figure_and_a_killed_one_goes_on(name, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["theory", "--study", name, "--quick", "--seed", "3", "--out", str(out)]
    assert main(command) == 0
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert (out / "figure.svg").read_text().count("<svg") == 1
    files = {file: (out / file).read_bytes() for file in ("rows.jsonl", "table.md", "figure.svg")}
    # killed in the last line
    (out / "rows.jsonl").write_bytes(files["rows.jsonl"][:-20])
    (out / "table.md").unlink()
    n_timed = len(rows(out / "timings.jsonl"))
    assert main(command) == 0
    assert {file: (out / file).read_bytes() for file in files} == files
    assert len(rows(out / "timings.jsonl")) == n_timed + 1
    assert main([*command, "--seed", "4"]) == 2
    assert "seed was 3, is 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "`model` must be given, or `--study`, got neither"),
        (["--study", "upper-bound"], "`study` must be one of lower-bound, linear-softmax, error-s"),
        (["--study", "lower-bound", "--seed", "-1"], "`seed` must be at least 0, got -1"),
        (["--study", "lower-bound", "--model", "game24"], "`model` must be left out with `--study"),
        (["--study", "lower-bound", "--task", "game24"], "`task` must be left out with `--study`"),
    ],
)
def test_bad_options_of_a_study_write_nothing(options, message, tmp_path, capsys):
    assert main(["theory", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
