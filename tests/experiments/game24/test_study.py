"""`sharpen study` end to end on a few puzzles: killed, gone on with, and finished."""

import json
import math
import shlex
import xml.etree.ElementTree as ET

import pytest
import torch

from sharpen.cli import main, parse
from sharpen.commands import rlhf
from sharpen.experiments.game24.plan import METHODS, plan, sizes_of
from sharpen.experiments.game24.selectors import REWARDS, selectors
from sharpen.sampling.hf import TransformersSampler
from sharpen.tasks import get_task
from sharpen.training.trainer import GroupTrainer

FLAGS = [
    "study",
    "game24",
    "--quick",
    "--limit",
    "6",
    "-n",
    "5",
    "--train-limit",
    "8",
    "--device",
    "cpu",
    "--out",
]
N = 5


class Killed(BaseException):
    pass


def killed(config):
    raise Killed


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(out):
    """Every output with its time, but locks."""
    return {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.suffix != ".lock"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study that was killed before its first `rlhf`, then finished; what the kill left."""
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf, "run", killed)
        with pytest.raises(Killed):
            main([*FLAGS, str(out)])
    left = files(out)
    assert main([*FLAGS, str(out)]) == 0
    return out, left, json.loads((out / "study.json").read_text())


def test_a_killed_study_goes_on_and_repeats_no_finished_stage(study):
    out, left, found = study
    assert not any(path.name == "study.json" for path in left)
    changed = {p for p, time in left.items() if p.stat().st_mtime_ns != time}
    assert {p.name for p in changed} == {"stages.jsonl"}
    journal = rows(out / "stages.jsonl")
    assert [row["stage"] for row in journal if not row["finished"]] == ["train/rlhf-0"]
    finished = [row["stage"] for row in journal if row["finished"]]
    assert finished == [stage["stage"] for stage in found["stages"]]
    assert len(set(finished)) == len(finished)


def without_seconds(found):
    """What a study found, but times."""
    if isinstance(found, dict):
        return {k: without_seconds(v) for k, v in found.items() if "seconds" not in k}
    return [without_seconds(x) for x in found] if isinstance(found, list) else found


def test_stages_side_by_side_find_the_same(study, tmp_path, monkeypatch):
    out, _, found = study
    # commands name their folder
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    # each process takes its share
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2 * threads)
    assert main([*FLAGS, "beside", "--jobs", "2"]) == 0
    again = json.loads((tmp_path / "beside" / "study.json").read_text().replace("beside", str(out)))
    again["machine"] = found["machine"]
    assert without_seconds(again) == without_seconds(found)
    assert "prompts" in (tmp_path / "beside" / "stages.log").read_text()


def test_a_finished_study_does_no_work(study, monkeypatch, capsys):
    out, _, _ = study
    before = files(out)
    for owner, name in ((TransformersSampler, "__init__"), (GroupTrainer, "train")):
        monkeypatch.setattr(owner, name, lambda *a, **k: pytest.fail("worked again"))
    assert main([*FLAGS, str(out)]) == 0
    after = files(out)
    assert before.keys() == after.keys()
    assert {p.suffix for p in after if before[p] != after[p]} <= {".svg", ".md"}
    printed = capsys.readouterr().out
    assert "6 test prompts" in printed
    assert printed.rstrip().endswith(str(out / "study.md"))


def test_other_settings_are_refused(study, capsys):
    assert main([*FLAGS, str(study[0]), "--seeds", "2"]) == 2
    assert "seeds was 1, is 2" in capsys.readouterr().err


def test_every_method_has_its_row_with_numbers_in_range(study):
    _, _, found = study
    named = {(row["group"], row["name"], row["n"]) for row in found["rows"]}
    wanted = {("decoding", name, None) for name in ("greedy", "T = 1", "T = 0.5", "T = 0.25")}
    wanted |= {("selection", name, N) for name in selectors()}
    wanted |= {
        ("power", name, N) for name in ("Metropolis-Hastings, power 4", "particles, power 4")
    }
    wanted |= {("training", f"{m}, {d}", None) for m in METHODS for d in ("T = 1", "greedy")}
    assert named == wanted
    for row in found["rows"]:
        low, high = row["ci95"]
        assert 0 <= low <= row["accuracy"] <= high <= 1, row["name"]
        assert -40 < row["logprob"] < 0, row["name"]
        assert 10 < row["length"] <= 48, row["name"]
        assert row["seconds"] > 0
        assert row["command"].startswith("sharpen ")
        assert row["seeds"] == [0]
        if row["group"] == "training":
            assert row["training"]["tokens_drawn"] > row["training"]["tokens_fitted"] / 10 > 0
            assert row["training"]["seconds"] >= row["training"]["seconds_of_fitting"] > 0
            if row["name"].endswith("T = 1"):
                assert -0.3 < row["kl"] < 3
                assert row["pass"]["n"] == N
    assert {row["reward"] for row in found["auroc"]} == {*REWARDS, "majority", "rpc"}
    assert all(0 <= row["auroc"] <= 1 for row in found["auroc"] if row["auroc"] is not None)
    assert len(found["by_prompt"]) == 6


def by(found, group, name):
    (row,) = (row for row in found["rows"] if (row["group"], row["name"]) == (group, name))
    return row


def test_accuracies_are_those_of_the_samples_on_disk(study):
    out, _, found = study
    task = get_task("game24")
    examples = task.examples("test")[:6]
    pool = rows(out / "base" / "pool-0.jsonl")
    grades = [
        [task.is_correct(e, text) for text in row["completions"]]
        for e, row in zip(examples, pool, strict=True)
    ]
    mean = sum(map(sum, grades)) / (6 * N)
    assert by(found, "decoding", "T = 1")["accuracy"] == pytest.approx(mean, abs=1e-4)
    best = 0
    for row, own in zip(pool, grades, strict=True):
        sums = [math.fsum(x) for x in row["logprobs"]]
        ended = [i for i, why in enumerate(row["finish_reasons"]) if why == "stop"]
        best += own[max(ended, key=sums.__getitem__)]
    row = by(found, "selection", "best-of-N, logprob")
    assert row["accuracy"] == pytest.approx(best / 6, abs=1e-4)
    judged = rows(out / "judge" / "sft-0.scored.jsonl")
    ratios = [
        math.fsum(own) - base
        for row in judged
        for own, base in zip(row["logprobs"], row["rewards"]["logprob"], strict=True)
    ]
    kl = by(found, "training", "sft, T = 1")["kl"]
    assert kl == pytest.approx(sum(ratios) / len(ratios), abs=1e-3)


def test_tokens_of_chains_are_those_that_they_counted(study):
    out, _, found = study
    chains = rows(out / "power" / f"mh{N}-0.jsonl")
    counted = [
        a + b for row in chains for a, b in zip(row["drawn"], row["read_again"], strict=True)
    ]
    row = by(found, "power", "Metropolis-Hastings, power 4")
    assert row["tokens"] == pytest.approx(sum(counted) / len(counted), abs=1e-3)
    assert row["n"] == N


def test_rounds_are_those_of_xpo(study):
    out, _, found = study
    own = rows(out / "train" / "xpo-0" / "rounds.jsonl")
    assert [row["round"] for row in found["rounds"]] == [row["round"] for row in own] == [0, 1]
    assert [row["value"] for row in found["rounds"]] == [row["value"] for row in own]
    best = max(found["rounds"], key=lambda row: row["value"])
    assert [row["round"] for row in found["rounds"] if row["kept"]] == [best["round"]]
    assert found["rounds"][1]["square"] >= 0


def test_fitted_tokens_are_prompts_and_chosen_completions(study):
    out, _, found = study
    pool = rows(out / "train" / "pool.jsonl")
    tokens = 0
    for row in pool:
        sums = [math.fsum(x) for x in row["logprobs"]]
        chosen = max(range(len(sums)), key=sums.__getitem__)
        tokens += len(row["prompt_ids"]) + len(row["completion_ids"][chosen])
    cost = by(found, "training", "sft, T = 1")["training"]
    assert cost["tokens_fitted"] == tokens
    drawn = sum(len(ids) for row in pool for ids in row["completion_ids"])
    assert cost["tokens_drawn"] == drawn


def test_commands_are_what_was_run(study, tmp_path):
    out, _, found = study
    config = parse("study", [*FLAGS[1:], str(out)])
    stages = plan(config, sizes_of(config))
    for stage, row in zip(stages, found["stages"], strict=True):
        program, verb, *flags = shlex.split(row["command"])
        assert (program, verb) == ("sharpen", stage.verb)
        assert parse(verb, flags) == stage.config


def test_the_page_has_every_row_and_whole_figures(study):
    out, _, found = study
    page = (out / "study.md").read_text()
    for row in found["rows"]:
        assert f"| {row['name']} |" in page
    assert "too small to rely on" in page
    for figure in ("selection", "power", "training", "auroc", "covariance"):
        assert f"]({figure}.svg)" in page
        root = ET.fromstring((out / f"{figure}.svg").read_text())
        assert len(root.findall(".//{http://www.w3.org/2000/svg}path")) > 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["study", "chess"], "`task` must be one of game24, got 'chess'"),
        (["study", "game24", "--seeds", "0"], "`seeds` must be at least 1, got 0"),
        (["study", "game24", "--jobs", "0"], "`jobs` must be at least 1, got 0"),
        (["study", "game24", "-n", "1"], "`n` must be at least 2, got 1"),
        (["study", "game24", "--train-limit", "4", "--quick"], "`train_limit` must be above"),
    ],
)
def test_bad_settings_are_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*argv, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
