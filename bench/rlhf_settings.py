"""What the settings of `sharpen rlhf` do on Game of 24 at equal samples, beside two of `sft`.

    python -m bench.rlhf_settings --runs runs --out docs/algorithms/training/rlhf_settings.jsonl
    python -m bench.rlhf_settings --check

Samples are drawn once. Each row holds the commands that made it, and of the model that they left:

    accuracy_*   one sample at T = 1 and greedy on the test puzzles; 95 %: bootstrap over puzzles
    gain_sample  of the accuracy at T = 1 over the base, points, and its band, puzzles paired
    logprob      mean log pi_base(y | x) of the model's own finished samples of the test, nats
    drawn_mass   sum of pi(y | x) over a prompt's distinct finished training samples, mean over
                 prompts: under the base, under the model
    square       mean of e^2 over the pairs that were fitted, before and after; nats^2
"""

import argparse
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench._measure import machine, steps
from sharpen import Scorer
from sharpen.cli import main as sharpen
from sharpen.cli import parse
from sharpen.commands import bon, rlhf, sample, sft
from sharpen.commands.inputs import open_source
from sharpen.commands.train import rate
from sharpen.evaluation.metrics import bootstrap_ci95
from sharpen.records import read_rows, write_rows
from sharpen.tasks import get_task
from sharpen.training import trainer
from sharpen.training.groups import Batch
from sharpen.training.losses import square_loss

Rows = list[dict[str, Any]]
# imported before the first long run, so that all rows are of one version
VERSION = bon, rlhf, sample, sft, trainer
TASK = ["--task", "game24", "--device", "cpu", "--max-new-tokens", "48"]
FIT = ["rlhf", "--lr", "3e-5"]
SETTINGS = {
    "base": [],
    "pairs random": [*FIT, "--beta", "0.3333", "--pairs", "random"],
    "pairs all": [*FIT, "--beta", "0.3333", "--pairs", "all"],
    "pairs best_worst": [*FIT, "--beta", "0.3333", "--pairs", "best_worst"],
    "standardise all": [*FIT, "--beta", "0.3333", "--standardise", "all"],
    "standardise prompt": [*FIT, "--beta", "0.3333", "--standardise", "prompt"],
    "beta 0.1": [*FIT, "--beta", "0.1"],
    "beta 1": [*FIT, "--beta", "1"],
    "sft best": ["sft", "--weights", "best"],
    "sft equal": ["sft", "--weights", "equal"],  # of samples of the power 4
}
POWER = {"sft equal": ["--sampler", "mh", "--alpha", "4", "--steps", "10"]}


def main() -> None:
    """Measure every setting, or check that it can be."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, help="where the commands write; goes on there")
    parser.add_argument("--out", type=Path, help="rows, JSON lines")
    parser.add_argument("--check", action="store_true", help="two settings, tiny")
    args = parser.parse_args()
    if args.check:
        with tempfile.TemporaryDirectory() as folder:
            test = ["-n", "2", "--limit", "4"]
            rows = [measured(name, Path(folder), 4, test) for name in steps(("base", "pairs all"))]
        assert all(0 < row["drawn_mass"][0] < 1 for row in rows), rows
        assert rows[-1]["square"][0] > 0, rows
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for name in steps(SETTINGS):
        found.append(measured(name, args.runs, 1000, ["-n", "20"]))
        write_rows(args.out, found)


def measured(name: str, runs: Path, limit: int, test: list[str]) -> dict[str, Any]:
    """One setting: trained, then judged; `test` says on how much."""
    slug, model = name.replace(" ", "-"), "game24"
    drawn = runs / f"samples{'-power' if name in POWER else ''}.jsonl"
    draw = ["--model", model, *TASK, "--split", "sharpen+free", "--limit", str(limit), "-n", "8"]
    commands = [done("sample", [*draw, *POWER.get(name, []), "--out", str(drawn)])]
    verb, *own = SETTINGS[name] or ["none"]
    fit = [*draw, "--samples", str(drawn), *own, "--out", str(runs / slug)]
    if SETTINGS[name]:
        commands.append(done(verb, fit))
        model = str(runs / slug / "model")
    out = runs / f"{slug}-test"
    flags = ["--model", model, *TASK, "--split", "test", *test, "--out", str(out)]
    commands.append(done("bon", flags))
    found = json.loads((out / "summary.json").read_text())
    row: dict[str, Any] = {"setting": name, "commands": commands, "test_prompts": found["prompts"]}
    for key in ("sample", "greedy"):
        row[f"accuracy_{key}"] = found["accuracy"][key]
        row[f"accuracy_{key}_95"] = found["ci95_of_baselines"][key]
    base, trained = Scorer("game24", device="cpu"), Scorer(model, device="cpu")
    said, before = (rows_of(x / "samples.jsonl") for x in (out, runs / "base-test"))
    row["gain_sample"] = gain_points(said, before)
    row["logprob"] = round(mean_logprob(base, said), 3)
    given = rows_of(drawn)
    row["drawn_mass"] = [round(drawn_mass(x, given), 4) for x in (base, trained)]
    if verb == "rlhf":
        row["square"] = [round(x, 3) for x in squares(fit, given, base, trained)]
    return row | {"machine": machine("cpu")}


def done(verb: str, flags: list[str]) -> str:
    """Run a command, or go on with it; how to type it."""
    line = shlex.join(["sharpen", verb, *flags])
    if sharpen([verb, *flags]) != 0:
        raise SystemExit(f"failed: {line}")
    return line


def rows_of(path: Path) -> Rows:
    """The records of a file."""
    return [row for _, row in read_rows(str(path))]


def sums(scorer: Scorer, rows: Rows) -> list[list[float]]:
    """Log-prob of each completion of each prompt, nats."""
    ids = [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows]
    return [x.tolist() for x in scorer.score(*ids).by_prompt("logprob")]


def drawn_mass(scorer: Scorer, rows: Rows) -> float:
    """Probability of all distinct finished completions of a prompt together, mean over prompts."""
    found = []
    for values, row in zip(sums(scorer, rows), rows, strict=True):
        each = zip(row["completion_ids"], values, row["finish_reasons"], strict=True)
        distinct = {tuple(ids): value for ids, value, reason in each if reason == "stop"}
        found.append(torch.tensor(list(distinct.values()), dtype=torch.float64).exp().sum())
    return float(torch.stack(found).mean())


def mean_logprob(scorer: Scorer, rows: Rows) -> float:
    """Mean log-prob of the finished completions of all prompts, nats."""
    kept = [
        value
        for values, row in zip(sums(scorer, rows), rows, strict=True)
        for value, reason in zip(values, row["finish_reasons"], strict=True)
        if reason == "stop"
    ]
    return sum(kept) / len(kept)


def gain_points(rows: Rows, before: Rows) -> list[float]:
    """Accuracy of one sample less that of another model on the same puzzles, and its 95 % band."""
    task = get_task("game24")
    examples = {example.id: example for example in task.examples("test")}

    def share(row: dict[str, Any]) -> float:
        example = examples[row["prompt_id"]]
        return float(np.mean([task.is_correct(example, text) for text in row["completions"]]))

    gain_P = np.array([share(a) - share(b) for a, b in zip(rows, before, strict=True)])
    return [round(100 * x, 2) for x in (float(gain_P.mean()), *bootstrap_ci95(gain_P))]


def squares(flags: list[str], rows: Rows, base: Scorer, model: Scorer) -> list[float]:
    """Mean e^2 over the pairs that `sharpen rlhf` with these flags fitted: base, model; nats^2."""
    config = parse("rlhf", flags)
    drawn = rate(Path(config.out), base, open_source(config, None), rows, config.reward)
    batch = Batch.of(rlhf.choose(config, drawn).groups)
    logprob = model.score(batch.prompts, batch.completions).reward("logprob").double()
    ratios = torch.zeros_like(logprob), logprob - batch.reference
    return [float(square_loss(x, batch.reward, batch.pairs, beta=config.beta)) for x in ratios]


if __name__ == "__main__":
    main()
