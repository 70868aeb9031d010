"""The numbers of `summary.json`, and the headline table made of them.

`summarize`      accuracy, lift, intervals, log-probability and cost of a run, as one JSON tree
`headline_rows`  the table of methods, as rows for the page of the report
`format_table`   the same as plain text for the terminal

Every key is always there; a figure that a run cannot have is null. Accuracies and shares are
fractions of 1, lifts are percent of the greedy accuracy, gains are percentage points,
log-probabilities are nats. `N` is a string, because JSON keys are.

P prompts, M per-prompt statistics, B bootstrap resamples.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharpen.errors import InputError

from .metrics import (
    BestOfK,
    Outcome,
    best_of_k,
    ci95,
    p_value,
    pass_at_k,
    resample_means,
    sample_accuracy,
)

# Any: a tree of JSON values, whose leaves are str, int, float or None
Summary = dict[str, Any]

GRID = (1, 5, 10, 25, 50)
RUN_KEYS = ("task", "model", "seed", "reward")


def summarize(
    outcome: Outcome,
    *,
    settings: Mapping[str, object],
    seconds: Mapping[str, float],
    tokens: Mapping[str, int],
) -> Summary:
    """Every figure of a run as a tree that `json.dump(..., allow_nan=False)` accepts.

    Best-of-N and pass@N come from random subsets of the n samples (`best_of_k`); intervals
    and p-values from one paired bootstrap over prompts, seeded with the run's seed.

    Args:
        outcome: The run.
        settings: "task" (or None), "model", "seed" (>= 0) and "reward" (one of
            `outcome.rewards`). "n", if there, must equal the samples per prompt. Anything
            else ("temperature", "versions", ...) is copied under `settings`.
        seconds: "sample" and "score".
        tokens: "sampled" and "scored".

    Returns:
        task, model, n, prompts, seed, reward; accuracy, lift_over_greedy_percent, ci95 (of each
        best-of-N accuracy); mean_logprob_of_chosen (by the run's reward); seconds, tokens. Then
        intervals of the baselines and of the lift, gains over one sample, p-values, the
        log-probabilities of every reward's choice, counts, and the other settings.

    Raises:
        InputError: If a setting is missing or contradicts the outcome.
    """
    seed, n = _check(outcome, settings, seconds, tokens), outcome.n_samples
    grid = n_values(n)
    best = {
        reward: {str(k): best_of_k(outcome, reward, k, seed=seed) for k in grid}
        for reward in outcome.rewards
    }
    logprob = {r: {k: rounded(b.mean_logprob, 4) for k, b in by.items()} for r, by in best.items()}
    no_choice = {r: int((by[str(n)].weight_PG.sum(axis=1) == 0).sum()) for r, by in best.items()}
    return {
        "task": _json(settings["task"]),
        "model": _json(settings["model"]),
        "n": n,
        "prompts": outcome.n_prompts,
        "seed": seed,
        "reward": settings["reward"],
        **_accuracy_figures(outcome, best, seed),
        "mean_logprob_of_chosen": logprob[str(settings["reward"])],
        "mean_logprob_by_reward": logprob,
        "seconds": {key: rounded(float(seconds[key]), 2) for key in ("sample", "score")},
        "tokens": {key: int(tokens[key]) for key in ("sampled", "scored")},
        "invalid_share": rounded(float((~outcome.valid_PG).mean()), 4),
        "prompts_without_choice": no_choice,
        "settings": _json(
            {k: v for k, v in settings.items() if k not in (*RUN_KEYS, "n", "prompts")}
        ),
    }


def n_values(n: int) -> list[int]:
    """1, 5, 10, 25, 50 up to `n`, then `n` itself if it is not one of them.

    Example:
        >>> n_values(30)
        [1, 5, 10, 25, 30]
    """
    return sorted({*(k for k in GRID if k <= n), n})


def _accuracy_figures(outcome: Outcome, best: dict[str, dict[str, BestOfK]], seed: int) -> Summary:
    """What needs grades: means, intervals and p-values from one set of resamples."""
    keys = (
        "accuracy",
        "lift_over_greedy_percent",
        "ci95",
        "ci95_of_baselines",
        "ci95_of_lift",
        "gain_over_sample_points",
        "ci95_of_gain",
        "p_value_vs_sample",
        "p_value_vs_greedy",
    )
    if outcome.correct_PG is None:
        return dict.fromkeys(keys)

    sample_P = sample_accuracy(outcome.correct_PG)
    column_P: dict[tuple[str, ...], np.ndarray] = {("sample",): sample_P}
    if outcome.greedy_correct_P is not None:
        column_P["greedy",] = outcome.greedy_correct_P.astype(np.float64)
    for k in n_values(outcome.n_samples):
        column_P["pass", str(k)] = pass_at_k(outcome.correct_PG, k)
    for reward, by_k in best.items():
        for k, point in by_k.items():
            if point.accuracy_P is not None:
                column_P[reward, k, "best"] = point.accuracy_P
    mean_BM = resample_means(np.stack([*column_P.values()], axis=1), seed=seed)
    mean_B = dict(zip(column_P, mean_BM.T, strict=True))
    mean = {key: float(value_P.mean()) for key, value_P in column_P.items()}
    greedy, greedy_B = mean.get(("greedy",)), mean_B.get(("greedy",))

    def over_rewards(figure) -> dict[str, dict[str, object]]:
        return {r: {k: figure((r, k, "best")) for k in by_k} for r, by_k in best.items()}

    def over_n(figure) -> dict[str, object]:
        return {k: figure(("pass", k)) for k in next(iter(best.values()))}

    def accuracy(key):
        return rounded(mean.get(key), 4)

    def interval(key):
        return _interval(mean_B.get(key), 4)

    def lift(key):
        return rounded(100 * (mean[key] - greedy) / greedy, 2) if greedy else None

    def lift_interval(key):
        # a resample may hold no prompt that greedy decoding solves: then the ratio has no interval
        if greedy_B is None or not greedy_B.all():
            return None
        return _interval(100 * (mean_B[key] / greedy_B - 1), 2)

    def p_against(baseline):
        base_B = mean_B.get(baseline)
        return lambda key: None if base_B is None else rounded(p_value(mean_B[key] - base_B), 4)

    return {
        "accuracy": {
            "greedy": accuracy(("greedy",)),
            "sample": accuracy(("sample",)),
            "pass_at_n": over_n(accuracy),
            "best_of_n": over_rewards(accuracy),
        },
        "lift_over_greedy_percent": over_rewards(lift),
        "ci95": over_rewards(interval),
        "ci95_of_baselines": {
            "greedy": interval(("greedy",)),
            "sample": interval(("sample",)),
            "pass_at_n": over_n(interval),
        },
        "ci95_of_lift": over_rewards(lift_interval),
        "gain_over_sample_points": over_rewards(
            lambda key: rounded(100 * (mean[key] - mean["sample",]), 2)
        ),
        "ci95_of_gain": over_rewards(
            lambda key: _interval(100 * (mean_B[key] - mean_B["sample",]), 2)
        ),
        "p_value_vs_sample": over_rewards(p_against(("sample",))),
        "p_value_vs_greedy": over_rewards(p_against(("greedy",))),
    }


def _interval(value_B: np.ndarray | None, digits: int) -> list[float | None] | None:
    return None if value_B is None else [rounded(x, digits) for x in ci95(value_B)]


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Rounded for JSON; None for what JSON has no number for."""
    if value is None or not math.isfinite(value):
        return None
    # + 0.0 turns -0.0, which would print, into 0.0
    return round(value, digits) + 0.0


def _json(value: object) -> object:
    """What `json.dump` takes: its own types as they are, anything else as text."""
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _check(
    outcome: Outcome,
    settings: Mapping[str, object],
    seconds: Mapping[str, float],
    tokens: Mapping[str, int],
) -> int:
    """The seed, once everything is in order."""
    wanted = (
        ("settings", settings, RUN_KEYS),
        ("seconds", seconds, ("sample", "score")),
        ("tokens", tokens, ("sampled", "scored")),
    )
    for name, mapping, keys in wanted:
        missing = [key for key in keys if key not in mapping]
        if missing:
            raise InputError(f"`{name}` must hold {missing}, got {sorted(mapping)}; add them.")
    if settings["reward"] not in outcome.rewards:
        raise InputError(
            f"`settings['reward']` must be one of {', '.join(outcome.rewards)}, "
            f"got {settings['reward']!r}; score the samples with it."
        )
    seed = settings["seed"]
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"`settings['seed']` must be an integer >= 0, got {seed!r}.")
    n = settings.get("n", outcome.n_samples)
    if n != outcome.n_samples:
        raise InputError(
            f"`settings['n']` must be the samples per prompt, {outcome.n_samples}, got {n!r}."
        )
    return seed


@dataclass(frozen=True)
class HeadlineRow:
    """One method at the largest N: what a reader compares first.

    Attributes:
        name: As shown.
        key: What it is in figures and style: "greedy", "sample", "pass" or a reward.
        accuracy: Fraction of 1 for each N; of one response, at "1" alone.
        ci95: Interval of the accuracy at the largest N.
        lift: Percent of the greedy accuracy at the largest N, then its interval; None for
            what is no way to choose.
        gain: Points over one sample, then its interval.
        p_vs_sample: Two-sided, paired; likewise `p_vs_greedy`.
    """

    name: str
    key: str
    accuracy: Mapping[str, float]
    ci95: list[float] | None = None
    lift: float | None = None
    ci95_of_lift: list[float] | None = None
    gain: float | None = None
    ci95_of_gain: list[float] | None = None
    p_vs_sample: float | None = None
    p_vs_greedy: float | None = None


def headline_rows(summary: Summary) -> list[HeadlineRow]:
    """Greedy, one sample, best-of-N by each reward, pass@N; without a checker, none."""
    accuracy, ci95 = summary["accuracy"], summary["ci95_of_baselines"]
    if accuracy is None:
        return []
    last = str(summary["n"])
    rows = []
    if accuracy["greedy"] is not None:
        rows.append(HeadlineRow("Greedy", "greedy", {"1": accuracy["greedy"]}, ci95["greedy"]))
    temperature = summary["settings"].get("temperature")
    name = "One sample" if temperature is None else f"One sample, T={temperature:g}"
    rows.append(HeadlineRow(name, "sample", {"1": accuracy["sample"]}, ci95["sample"]))
    rows += [
        HeadlineRow(
            f"Best of N, {reward}",
            reward,
            by_n,
            summary["ci95"][reward][last],
            summary["lift_over_greedy_percent"][reward][last],
            summary["ci95_of_lift"][reward][last],
            summary["gain_over_sample_points"][reward][last],
            summary["ci95_of_gain"][reward][last],
            summary["p_value_vs_sample"][reward][last],
            summary["p_value_vs_greedy"][reward][last],
        )
        for reward, by_n in accuracy["best_of_n"].items()
    ]
    rows.append(HeadlineRow("Pass@N", "pass", accuracy["pass_at_n"], ci95["pass_at_n"][last]))
    return rows


def format_table(summary: Summary) -> str:
    """The plain-text table that a command prints: every method at every N, in percent.

    Without a checker it holds the mean log-probability of the chosen instead, in nats.
    """
    last = str(summary["n"])
    facts = [str(summary["task"])] if summary["task"] is not None else []
    facts += [
        f"model {summary['model']}",
        f"{summary['prompts']} prompts",
        f"n = {last}",
        f"seed {summary['seed']}",
    ]
    routes = summary["settings"].get("routes", {})
    facts += [f"{stage} route {route!r}" for stage, route in routes.items()]
    by_reward = summary["mean_logprob_by_reward"]
    rows = headline_rows(summary)
    columns = list(summary["mean_logprob_of_chosen"])
    heads = [f"N={columns[0]}", *columns[1:]]
    if not rows:
        lines = [["log-probability of the chosen, nats", *heads]]
        lines += [
            [
                f"Best of N, {reward}",
                *("-" if by_n[k] is None else f"{by_n[k]:.2f}" for k in columns),
            ]
            for reward, by_n in by_reward.items()
        ]
        return "\n".join([", ".join(facts), "", *_aligned(lines)])
    lines = [["accuracy, %", *heads, f"95 % at {last}", "over greedy", "over one sample", "p"]]
    for row in rows:
        lines.append(
            [
                row.name,
                *(f"{100 * row.accuracy[k]:.1f}" if k in row.accuracy else "" for k in columns),
                "" if row.ci95 is None else f"{100 * row.ci95[0]:.1f} to {100 * row.ci95[1]:.1f}",
                "" if row.lift is None else f"{row.lift:+.1f} %",
                "" if row.gain is None else f"{row.gain:+.1f} points",
                "" if row.p_vs_sample is None else f"{row.p_vs_sample:.4f}",
            ]
        )
    return "\n".join([", ".join(facts), "", *_aligned(lines)])


def _aligned(lines: list[list[str]]) -> list[str]:
    """Columns of one width, the first to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
