"""Trainings know how given samples were drawn, and refuse or tell what their optimum cannot be."""

import json

import pytest

from sharpen.cli import main
from sharpen.commands.inputs import Provenance, provenance_of, read_provenance
from sharpen.models import load_model
from sharpen.scoring import Scorer

MODEL = ["--model", "game24", "--device", "cpu"]
TASK = ["--task", "game24", "--split", "sharpen", "--limit", "4", "--max-new-tokens", "30"]
TRAIN = [*MODEL, *TASK, "-n", "5", "--max-tokens", "2000", "--batch", "2", "--epochs", "3"]
PLAIN = {"command": "sample", "model": "game24", "temperature": 1.0, "top_p": 1.0}


pytestmark = pytest.mark.usefixtures("frozen_heap")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def drawn(out, *flags):
    argv = ["sample", *MODEL, *TASK, "-n", "5", "--out", str(out), *flags]
    assert main(argv) == 0
    return out


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools")
    mh = ["--sampler", "mh", "--alpha", "3", "--steps", "2"]
    smc = ["--sampler", "smc", "--particles", "6"]
    kinds = {"plain": [], "cold": ["--temperature", "0.5"], "mh": mh, "smc": smc}
    return {name: drawn(folder / f"{name}.jsonl", *flags) for name, flags in kinds.items()}


LAWS = {
    "plain": "draws of game24",
    "cold": "draws of game24, temperature 0.5",
    "mh": "draws of game24, `--sampler mh` alpha 3",
    "smc": "draws of game24, `--sampler smc` alpha 4",
}


@pytest.mark.parametrize("name", LAWS)
def test_the_law_is_read_beside_the_samples(pools, name):
    law = read_provenance(str(pools[name]))
    assert str(law) == LAWS[name]
    assert law.is_plain is (name == "plain")


@pytest.mark.parametrize(
    ("settings", "row", "law"),
    [
        (None, {}, None),
        # `sharpen score` did not draw them
        ({"command": "score", "model": "game24"}, {}, None),
        (
            {"command": "score", "model": "game24"},
            {"accepted": [0.5]},
            Provenance(None, None, "mh", None),
        ),
        (PLAIN | {"sampler": "smc", "alpha": 1.0}, {}, Provenance("game24", None, "smc", 1.0)),
        (PLAIN | {"top_p": 0.9}, {}, Provenance("game24", top_p=0.9)),
        # the optimism of XPO
        (PLAIN | {"command": "xpo", "alpha": 1e-4}, {}, Provenance("game24")),
        (
            PLAIN | {"model": "", "endpoint": "http://a/v1", "endpoint_model": "b"},
            {},
            Provenance("b", "http://a/v1"),
        ),
    ],
)
def test_the_law_of_settings(settings, row, law):
    assert provenance_of(settings, row) == law


def test_a_run_directory_tells_of_its_own_samples_alone(pools, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(PLAIN | {"temperature": 0.7}))
    for name in ("samples.jsonl", "greedy.jsonl"):
        (tmp_path / name).write_bytes(pools["plain"].read_bytes())
    assert read_provenance(str(tmp_path / "samples.jsonl")) == Provenance("game24", temperature=0.7)
    assert read_provenance(str(tmp_path / "greedy.jsonl")) is None


@pytest.mark.parametrize("name", ["cold", "mh", "smc"])
def test_soft_weights_refuse_other_laws(pools, tmp_path, capsys, name):
    argv = ["sft", *TRAIN, "--samples", str(pools[name]), "--weights", "soft"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "plain draws of game24 for `--weights soft`, whose optimum is another" in error
    assert f"got {LAWS[name]}; use `--weights equal`" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--temperature", "--top-p"])
def test_soft_weights_refuse_to_draw_from_another_law(tmp_path, capsys, flag):
    argv = ["sft", *TRAIN, "--weights", "soft", flag, "0.5", "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "`temperature` and `top_p` must make plain draws" in capsys.readouterr().err


def test_a_power_sampler_is_told_by_its_rows_without_settings(pools, tmp_path, capsys):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(pools["smc"].read_bytes())
    argv = ["sft", *TRAIN, "--samples", str(copy), "--weights", "soft"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "got draws of a model, `--sampler smc`; use" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["plain", "mh"])
def test_pairs_of_another_law_are_told(pools, tmp_path, capsys, name):
    argv = ["rlhf", *TRAIN, "--samples", str(pools[name]), "--lr", "1e-5"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    told = "Eq. (8) takes pairs of plain draws of game24, got draws of game24, `--sampler mh`"
    assert (told in capsys.readouterr().err) is (name == "mh")


def test_log_probs_of_another_model_are_not_the_bases(pools, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_bytes(pools["plain"].read_bytes())
    beside = tmp_path / "other.jsonl.run.json"
    argv = ["sft", *TRAIN, "--samples", str(other), "--scores", "sampler"]
    argv += ["--out", str(tmp_path / "out")]
    beside.write_text(json.dumps(PLAIN | {"model": "/models/another"}))
    assert main(argv) == 2
    assert "are those of game24, got draws of /models/another" in capsys.readouterr().err
    for text in ("{", "[]"):
        beside.write_text(text)
        assert main(argv) == 2
        assert "must hold the settings of its samples, got" in capsys.readouterr().err
    beside.write_text(json.dumps(PLAIN | {"endpoint": "http://a/v1", "endpoint_model": "b"}))
    assert main(argv) == 0
    assert "log-probs by b at http://a/v1 are taken as those of game24" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mh", "smc"])
def test_power_samples_are_distilled_by_equal_weights(pools, tmp_path, capsys, name):
    """Sampled from p^alpha, then made likelier: the same by kept and by computed log-probs."""
    samples = rows(pools[name])
    finished = [
        (row["prompt_ids"], ids, logprobs)
        for row in samples
        for ids, logprobs, reason in zip(
            row["completion_ids"], row["logprobs"], row["finish_reasons"], strict=True
        )
        if reason == "stop"
    ]
    prompts, completions = [p for p, _, _ in finished], [[ids] for _, ids, _ in finished]
    kept = sum(sum(x) for _, _, x in finished)
    argv = ["sft", *TRAIN, "--samples", str(pools[name]), "--weights", "equal", "--lr", "3e-4"]
    for scores in ("scorer", "sampler"):
        out = tmp_path / scores
        assert main([*argv, "--scores", scores, "--out", str(out)]) == 0
        told = capsys.readouterr()
        assert f"fitted {len(finished)} completions of 4 of 4 prompts" in told.out
        assert "plain draws" not in told.err
        summary = json.loads((out / "summary.json").read_text())
        assert summary["base_logprob_fitted"] == pytest.approx(kept / len(finished), abs=1e-4)
        base, model = (load_model(m, device="cpu") for m in ("game24", out / "model"))
        before, after = (
            Scorer(m).score(prompts, completions).reward("logprob").sum().item()
            for m in (base, model)
        )
        # raw log-probs of the model, at whatever temperature they were proposed
        assert before == pytest.approx(kept, abs=1e-3)
        assert after > before + 0.5
