"""`sharpen bon`: sample N completions a prompt, keep what the model itself rates highest.

Writes into its run directory: `samples.jsonl` (every completion, as it is drawn), `greedy.jsonl`
(tasks only), `chosen.jsonl` (the best of each prompt: trains as it is with TRL's SFT),
`summary.json` and `report.html`.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from sharpen.errors import InputError
from sharpen.evaluation import Outcome, Texts, summarize
from sharpen.evaluation.metrics import MAJORITY
from sharpen.evaluation.report import render_report
from sharpen.evaluation.summary import format_table
from sharpen.records import Row, completion_as, write_rows, write_text
from sharpen.runs import Journal, Run, Settings
from sharpen.sampling import SamplingConfig
from sharpen.sampling.base import render_all
from sharpen.scoring import Scorer, Scores
from sharpen.scoring.rewards import stats_needed
from sharpen.selection import best_of_n
from sharpen.text import TextCodec

from .engines import check_engine, load_engine, sampling_config
from .inputs import (
    Source,
    check_reward,
    check_source,
    load,
    model_settings,
    open_source,
    source_settings,
)
from .options import BonConfig
from .stages import (
    RUN,
    SAMPLES,
    SCORES,
    SUMMARY,
    TIMINGS,
    json_numbers,
    kept_scores,
    sample_into,
    score_samples,
    seconds_of,
    token_keys,
    versions_of,
    with_ids,
)

GREEDY, CHOSEN, REPORT = "greedy.jsonl", "chosen.jsonl", "report.html"


def run(config: BonConfig) -> None:
    """Run the command, or go on with it."""
    check(config)
    draws, out = sampling_config(config), Path(config.out)
    outputs = [out / name for name in (SAMPLES, GREEDY, CHOSEN, SUMMARY, REPORT, SCORES)]
    greedy = None
    with ExitStack() as stack:
        # sample
        with load_engine(config) as engine:
            tokenizer, sampler, model = engine.tokenizer, engine.sampler, engine.model
            source = open_source(config, tokenizer)
            prompts = render_all(source.records, tokenizer)
            sampler.check(prompts, draws)
            stack.enter_context(Run(out / RUN, settings(config, engine.device), outputs))
            timings = Journal(out / TIMINGS)
            samples = sample_into(out / SAMPLES, sampler, prompts, draws, timings=timings)
            routes: dict[str, str] = {"sampling": sampler.route}
            if source.task is not None:
                once = SamplingConfig(temperature=0.0, max_new_tokens=config.max_new_tokens)
                greedy = sample_into(out / GREEDY, sampler, prompts, once, label="greedy")
        # score; an engine that is not the model itself has given its memory back by now
        if config.scores == "scorer":
            if model is None or tokenizer is None:
                model, tokenizer = load(config)
            scorer = Scorer(model, tokenizer=tokenizer, max_tokens=config.max_tokens)
            stats = tuple(dict.fromkeys(["logprob", *stats_needed(config.reward)]))
            codec = TextCodec(tokenizer, model.generation_config)
            samples = [with_ids(row, codec) for row in samples]
            codec.warn_merged()
            scores = score_samples(out / SCORES, scorer, samples, stats, timings)
            routes["scoring"] = scorer.route.sharing
        else:
            scores = kept_scores(samples)
        # choose
        reward_N = scores.reward(config.reward, **source.reward_options(config.reward, samples))
        outcome = outcome_of(config, source, samples, greedy, scores, reward_N)
        write_rows(out / CHOSEN, chosen_rows(source, samples, scores, reward_N, outcome))
        # report
        n_tokens = sum(len(tokens) for row in samples for tokens in row["logprobs"])
        summary = summarize(
            outcome,
            settings={
                "task": config.task,
                "model": config.model or config.endpoint_model,
                "prompts": len(prompts),
                "reward": config.reward,
                "scores": config.scores,
                "split": config.split if config.task else None,
                **config.draw_settings(),
                "routes": routes,
                "versions": versions_of("sharpen", "torch", "transformers"),
            },
            seconds={"sample": 0.0, "score": 0.0} | seconds_of(out / TIMINGS),
            tokens={"sampled": n_tokens, "scored": int(scores.offsets[-1])},
        )
        texts = Texts([prompt.text for prompt in prompts], [row["completions"] for row in samples])
        write_text(out / REPORT, render_report(summary, outcome, texts))
        write_text(out / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
        sys.stdout.write(f"{format_table(summary)}\nreport: {out / REPORT}\n")


def check(config: BonConfig) -> None:
    """Reject bad options before anything is loaded or written."""
    check_source(config)
    check_reward(config.reward, config.task)
    check_engine(config)
    if config.scores == "scorer" and not config.model:
        raise InputError("`--scores scorer` needs `--model`, the model that rates the samples.")
    needs = stats_needed(config.reward)
    if config.scores == "sampler" and not set(needs) <= {"logprob"}:
        raise InputError(
            f"`reward` {config.reward} needs {', '.join(needs)}, which sampling does not keep; "
            "add `--scores scorer`."
        )


def settings(config: BonConfig, device: str) -> Settings:
    """Everything that the outputs depend on."""
    return {
        "command": "bon",
        **model_settings(config, device),
        **source_settings(config),
        **config.draw_settings(),
        "reward": config.reward,
        "scores": config.scores,
        **config.engine_settings(),
    }


def outcome_of(
    config: BonConfig,
    source: Source,
    samples: list[Row],
    greedy: list[Row] | None,
    scores: Scores,
    reward_N: torch.Tensor,
) -> Outcome:
    """Rewards and grades of all completions."""
    shape = (len(samples), config.n)
    rewards = {name: scores.reward(name) for name in ("logprob", "mean_logprob")}
    # a majority is counted anew in every subset of the samples
    if config.reward != MAJORITY:
        rewards[config.reward] = reward_N
    correct_PG = greedy_correct_P = None
    if source.task is not None and source.examples is not None and greedy is not None:
        is_correct = source.task.is_correct
        pairs = list(zip(source.examples, samples, strict=True))
        correct_PG = np.array([[is_correct(e, t) for t in row["completions"]] for e, row in pairs])
        once = zip(source.examples, greedy, strict=True)
        greedy_correct_P = np.array([is_correct(e, row["completions"][0]) for e, row in once])
    return Outcome(
        reward_PG={name: x.double().numpy().reshape(shape) for name, x in rewards.items()},
        valid_PG=scores.eligible.numpy().reshape(shape),
        correct_PG=correct_PG,
        greedy_correct_P=greedy_correct_P,
        answers=source.answers(samples),
        response_PG=np.array([_numbered(token_keys(row)) for row in samples]),
    )


def chosen_rows(
    source: Source, samples: list[Row], scores: Scores, reward_N: torch.Tensor, outcome: Outcome
) -> Iterator[Row]:
    """The best completion of each prompt as a training record: TRL's names, and ids."""
    bounds = scores.groups.tolist()
    reward = json_numbers(reward_N.tolist())
    logprob = json_numbers(scores.reward("logprob").tolist())
    for p, index in enumerate(best_of_n(scores, reward_N).tolist()):
        if index < 0:
            continue
        row, prompt = samples[p], source.records[p].prompt
        has_ids = "completion_ids" in row
        yield {
            "prompt_id": row["prompt_id"],
            "prompt": prompt,
            "completion": completion_as(prompt, row["completions"][index]),
            **({"completion_ids": row["completion_ids"][index]} if has_ids else {}),
            "sample_id": index,
            "reward": reward[bounds[p] + index],
            "logprob": logprob[bounds[p] + index],
            "correct": None if outcome.correct_PG is None else bool(outcome.correct_PG[p, index]),
        }


def _numbered(keys: list[tuple[int | str, ...]]) -> list[int]:
    seen: dict[tuple[int | str, ...], int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys]
