"""`sharpen theory --study NAME`: a small study without a model.

Writes into its run directory: `rows.jsonl` (a line a case, as it is measured), `table.md` and
`figure.svg`.

`sharpen theory`: the exact y*(x) of every prompt, and what the paper's bounds say with it.

Writes into its run directory: `modes.jsonl` (a line a prompt: y*, its log-prob, proof and cost, as
it is found), `greedy.jsonl`, `policy.jsonl` (with `--policy`) and `theory.json`. With `--study` it
runs a small study instead: `theory_study`.
"""

import json
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sharpen.commands.inputs import check_source, load, model_settings, open_source, source_settings
from sharpen.commands.stages import CHUNK, sample_into
from sharpen.errors import InputError
from sharpen.experiments.options import TheoryConfig
from sharpen.experiments.theory.coverage import check_share
from sharpen.experiments.theory.findings import Known, findings, format_table
from sharpen.experiments.theory.search import Mode, SearchConfig, find_mode
from sharpen.experiments.theory.studies import STUDIES
from sharpen.experiments.theory.study import chart_svg
from sharpen.models import load_model
from sharpen.records import Row, write_text
from sharpen.runs import Journal, Run
from sharpen.sampling import Prompt, SamplingConfig
from sharpen.sampling.base import render_all
from sharpen.sampling.hf import TransformersSampler
from sharpen.scoring import Scorer

ROWS, TABLE, FIGURE, TIMINGS = "rows.jsonl", "table.md", "figure.svg", "timings.jsonl"


def run_study(name: str, out: Path, *, seed: int, quick: bool) -> None:
    """Run the study, or go on with it."""
    study = STUDIES[name](quick=quick)
    settings = {"command": "theory", "study": name, "seed": seed, "quick": quick}
    with Run(out / "run.json", settings, [out / file for file in (ROWS, TABLE, FIGURE)]):
        journal, timings = Journal(out / ROWS), Journal(out / TIMINGS)
        rows = list(journal.rows)
        n = len(study.cases)
        for i in tqdm(range(len(rows), n), initial=len(rows), total=n, desc=name, unit="case"):
            started = time.monotonic()
            row = study.row(i, seed)
            journal.append([row])
            timings.append([{"stage": name, "seconds": time.monotonic() - started}])
            rows.append(row)
        text = study.table(rows)
        write_text(out / TABLE, text)
        write_text(out / FIGURE, chart_svg(study.panels(rows), name))
    sys.stdout.write(f"{text}\ntheory: {out / TABLE}, {out / FIGURE}\n")


MODES, GREEDY, POLICY = "modes.jsonl", "greedy.jsonl", "policy.jsonl"
THEORY, TIMINGS = "theory.json", "timings.jsonl"


def run(config: TheoryConfig) -> None:
    """Run the command, or go on with it."""
    if config.study is not None:
        _check_study(config)
        run_study(config.study, Path(config.out), seed=config.seed, quick=config.quick)
        return
    if not config.model:
        raise InputError("`model` must be given, or `--study`, got neither.")
    check_source(config)
    search = SearchConfig(
        max_new_tokens=config.max_new_tokens,
        gamma=config.gamma,
        max_expansions=config.max_expansions,
        max_tokens=config.max_tokens,
    )
    for delta in config.deltas:
        check_share("deltas", delta)
    model, tokenizer = load(config)
    prompts = render_all(open_source(config, tokenizer).records, tokenizer)
    once = SamplingConfig(temperature=0.0, max_new_tokens=config.max_new_tokens)
    sampler = TransformersSampler(model, tokenizer, max_tokens=config.max_tokens)
    sampler.check(prompts, once)
    scorer = Scorer(model, tokenizer=tokenizer, max_tokens=config.max_tokens)
    policy = None if config.policy is None else _policy(config)
    out = Path(config.out)
    settings = {
        "command": "theory",
        **model_settings(config, model.device.type),
        **source_settings(config),
        "max_new_tokens": config.max_new_tokens,
        "gamma": config.gamma,
        "max_expansions": config.max_expansions,
        "deltas": config.deltas,
        "policy": config.policy,
    }
    outputs = [out / name for name in (MODES, GREEDY, POLICY, THEORY)]
    with Run(out / "run.json", settings, outputs):
        modes = search_into(
            out / MODES, scorer, tokenizer, prompts, search, sampler.eos_ids, Journal(out / TIMINGS)
        )
        greedy = sample_into(out / GREEDY, sampler, prompts, once, label="greedy")
        judged = None if policy is None else score_into(out / POLICY, policy, prompts, modes)
        known = [
            _known(modes[p], greedy[p], None if judged is None else judged[p])
            for p in range(len(prompts))
            if modes[p]["listed_logprobs"]
        ]
        if not known:
            raise InputError(
                f"`model` must end some completion within {config.max_new_tokens} tokens, but its "
                "logits are NaN or rule out every end; nothing can be said of it."
            )
        found = findings(known, gamma=config.gamma, deltas=config.deltas)
        found = {"settings": settings, "n_nothing_ended": len(prompts) - len(known), **found}
        write_text(out / THEORY, json.dumps(found, indent=2, allow_nan=False) + "\n")
        sys.stdout.write(f"{format_table(found)}\ntheory: {out / THEORY}\n")


def _check_study(config: TheoryConfig) -> None:
    if config.study not in STUDIES:
        raise InputError(f"`study` must be one of {', '.join(STUDIES)}, got {config.study!r}.")
    if config.seed < 0:
        raise InputError(f"`seed` must be at least 0, got {config.seed}.")
    for name in ("model", "task", "prompts", "policy"):
        if getattr(config, name):
            raise InputError(
                f"`{name}` must be left out with `--study`, which has its own models, "
                f"got {getattr(config, name)!r}."
            )


def _policy(config: TheoryConfig) -> Scorer:
    assert config.policy is not None
    model = load_model(
        config.policy,
        device=config.device,
        dtype=None if config.dtype == "auto" else config.dtype,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
    )
    return Scorer(model, max_tokens=config.max_tokens)


def search_into(
    path: Path,
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    config: SearchConfig,
    eos_ids: tuple[int, ...],
    timings: Journal,
) -> list[Row]:
    """Search what `path` does not hold yet; return all its rows, one a prompt, in input order."""
    journal = Journal(path)
    rows = list(journal.rows)
    with tqdm(total=len(prompts), initial=len(rows), desc="search", unit="prompt") as bar:
        for prompt in prompts[len(rows) :]:
            started = time.monotonic()
            row = mode_row(prompt, tokenizer, find_mode(scorer, prompt.ids, eos_ids, config))
            journal.append([row])
            rows.append(row)
            timings.append([{"stage": "search", "seconds": time.monotonic() - started}])
            bar.update()
    return rows


def mode_row(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, mode: Mode) -> Row:
    """The record of one prompt; null is -inf."""
    ids = list(mode.sequences[0]) if mode.sequences else None
    text = None if ids is None else str(tokenizer.decode(ids, skip_special_tokens=True))
    return {
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "completion": text,
        "completion_ids": ids,
        "logprob": _json(mode.logprob),
        "runner_up": _json(mode.runner_up),
        "bound": _json(mode.bound),
        "proved": mode.proved,
        "complete": mode.complete,
        "n_expanded": mode.n_expanded,
        "finished_mass": mode.finished_mass,
        "cut_mass": mode.cut_mass,
        "cut_bound": _json(mode.cut_bound),
        "rounding": mode.rounding,
        "listed_ids": [list(ids) for ids in mode.sequences],
        "listed_logprobs": mode.logprobs,
    }


def score_into(path: Path, policy: Scorer, prompts: list[Prompt], modes: list[Row]) -> list[Row]:
    """Log-probs of every listed completion under the policy, kept in `path` one prompt a line."""
    journal = Journal(path)
    rows = list(journal.rows)
    for start in range(len(rows), len(prompts), CHUNK):
        chunk = slice(start, start + CHUNK)
        scores = policy.score(
            [list(prompt.ids) for prompt in prompts[chunk]],
            [mode["listed_ids"] for mode in modes[chunk]],
        )
        by_prompt = scores.by_prompt("logprob")
        pairs = zip(prompts[chunk], by_prompt, strict=True)
        fresh = [
            {"prompt_id": prompt.id, "listed_logprobs": [_json(x) for x in logprobs.tolist()]}
            for prompt, logprobs in pairs
        ]
        journal.append(fresh)
        rows += fresh
    return rows


def _known(mode: Row, greedy: Row, judged: Row | None) -> Known:
    policy = None if judged is None else [_float(x) for x in judged["listed_logprobs"]]
    return Known(
        logprobs=mode["listed_logprobs"],
        bound=_float(mode["bound"]),
        proved=mode["proved"],
        complete=mode["complete"],
        n_expanded=mode["n_expanded"],
        cut_bound=_float(mode["cut_bound"]),
        rounding=mode["rounding"],
        greedy_found=greedy["completion_ids"][0] == mode["completion_ids"],
        policy_logprobs=policy,
    )


def _json(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _float(x: float | None) -> float:
    return -math.inf if x is None else x
