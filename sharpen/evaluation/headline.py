"""The headline table, once as rows for the page and once as plain text for the terminal."""

from collections.abc import Mapping
from dataclasses import dataclass

from .summary import Summary


@dataclass(frozen=True)
class Row:
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


def headline_rows(summary: Summary) -> list[Row]:
    """Greedy, one sample, best-of-N by each reward, pass@N; without a checker, none."""
    accuracy, ci95 = summary["accuracy"], summary["ci95_of_baselines"]
    if accuracy is None:
        return []
    last = str(summary["n"])
    rows = []
    if accuracy["greedy"] is not None:
        rows.append(Row("Greedy", "greedy", {"1": accuracy["greedy"]}, ci95["greedy"]))
    rows.append(Row(sample_name(summary), "sample", {"1": accuracy["sample"]}, ci95["sample"]))
    rows += [
        Row(
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
    rows.append(Row("Pass@N", "pass", accuracy["pass_at_n"], ci95["pass_at_n"][last]))
    return rows


def sample_name(summary: Summary) -> str:
    """How one sample is called: with its temperature, if the settings say it."""
    temperature = summary["settings"].get("temperature")
    return "One sample" if temperature is None else f"One sample, T={temperature:g}"


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
            [f"Best of N, {reward}", *(_fixed(by_n[k], 2) for k in columns)]
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


def _fixed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


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
