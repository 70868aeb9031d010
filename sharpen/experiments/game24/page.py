"""`study.md` and its figures: the tables of a study for people.

`format_page`, `headline`   the page in Markdown, and its first lines as plain text
`..._table`                 the tables of the page: a head and a cell for each column
`figure_files`              the figures, each one SVG that stands alone; bands are 95 % over puzzles

All from the rows of `study.json`.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sharpen.evaluation.figures import (
    INK,
    RC,
    RULE,
    SERIES,
    End,
    against_n,
    look,
    name_ends,
    panel,
    svg,
)
from sharpen.records import Row

DASH = "\N{EN DASH}"
PAPER = "#ffffff"
# of selectors, those whose curves are drawn; the table has all
CURVES = (
    "best-of-N, logprob",
    "best-of-N, mean_logprob",
    "majority",
    "probability-weighted majority",
    "Borda, self_certainty",
)
TITLES = {
    "sft": "SFT-Sharpening: the best of N samples by log-prob, fitted; all prompts and samples",
    "sft-round2": "a second round: samples of the model of `sft`, by its own log-prob",
    "sft-round3": "a third round",
    "sft-greedy": "a second round: what greedy decoding of the model of `sft` finds, one a prompt",
    "sft-greedy2": "a third round of that kind",
    "sft-transductive": "SFT-Sharpening, transductive: fitted on the test prompts themselves",
    "sft-equal": "SFT-Sharpening on as many samples as the objectives below",
    "soft-sft": "power self-distillation: all samples, by p^(alpha - 1)",
    "rlhf": "RLHF-Sharpening: square loss of Eq. (8) on random pairs",
    "dpo": "DPO on the best and the worst sample",
    "xpo": "XPO: rounds of new samples, optimism",
}


def format_page(study: Row) -> str:
    """The whole page."""
    settings = study["settings"]
    total = sum(stage["seconds"] for stage in study["stages"])
    quick = " This is a quick run, too small to rely on." if settings["quick"] else ""
    machine = study["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    flags = " --quick" if settings["quick"] else ""
    flags += f" --train-seeds {settings['train_seeds']}"
    if machine["jobs"] > 1:
        flags += f" --jobs {machine['jobs']}"
    command = f"sharpen study {settings['task']}{flags}"
    parts = [
        f"# Study: {settings['task']}",
        f"`{command}` on {study['prompts']} test prompts, {settings['seeds']} seeds of samples and "
        f"{settings['train_seeds']} of training: "
        f"{len(study['stages'])} runs, {total / 60:.1f} minutes in all, {machine['jobs']} at a "
        f"time, {machine['threads']} threads ({versions}). Accuracies are in % with 95 % bands: a "
        f"bootstrap over prompts of their mean over seeds. Log-probs are those of the base model, "
        f"in nats.{quick}",
        "## Without a choice",
        decoding_table(study),
        "## Selection\n\n![Accuracy against N](selection.svg)",
        "Expectations over subsets of one pool of samples a seed: exact for best-of-N, else over "
        "random subsets. The KL to the base is at most log N - (N - 1)/N nats for best-of-N by a "
        "fixed reward, and not known for the others; lengths, tokens and KL are at the largest N.",
        selection_table(study),
        selection_facts_table(study),
        "## Samplers of the power distribution\n\n![Accuracy against tokens](power.svg)",
        power_table(study),
        "## Trained models\n\n![Accuracy of trained models](training.svg)",
        training_table(study),
        "Gap closed: the gain over one sample of the base, as a share of that of "
        f"best-of-{study['target_n']} by log-prob. Drawn and fitted: tokens in training.",
        "\n".join(f"- `{name}`: {title}." for name, title in TITLES.items()),
        "J_beta: mean of log pi_base(y) less beta times the log-ratio of model to base, over "
        "samples of held-out training prompts; the round of the highest is kept. Mean e^2 and "
        "optimism: the two terms of the loss that the fit of the round has left.",
        rounds_table(study),
        "## Does the self-reward follow the true one?\n\n![AUROC](auroc.svg)",
        auroc_table(study),
        "![Covariance](covariance.svg)",
        covariance_table(study),
        "The covariance with log p under p^alpha is the slope of the accuracy in alpha, prompt by "
        "prompt; here by weights of the samples.",
        under_power_table(study),
        "## Every run\n",
        stages_table(study),
    ]
    return "\n\n".join(parts) + "\n"


def headline(study: Row) -> str:
    """What a reader wants first, in plain text."""
    by = {(row["group"], row["name"], row["n"]): row for row in study["rows"]}
    n = study["target_n"]
    facts = [
        ("greedy", by["decoding", "greedy", None]),
        ("one sample", by["decoding", "T = 1", None]),
        (f"best-of-{n}, logprob", by["selection", "best-of-N, logprob", n]),
    ]
    facts += [(row["name"], row) for row in _rows_of(study, "training")]
    lines = [f"{study['prompts']} test prompts, accuracy in % with its 95 % band over prompts"]
    for name, row in facts:
        share = (row.get("gap_closed") or {}).get("share")
        closed = "" if share is None else f"  closes {100 * share:.0f} % of the gap"
        lines.append(f"{name:24s}{_percent(row['accuracy']):>6s}  {_band(row['ci95'])}{closed}")
    return "\n".join(lines)


# a head, and the cell below it that a row gives
Columns = Sequence[tuple[str, Callable[[Row], str]]]


def decoding_table(study: Row) -> str:
    """Greedy, one sample, low temperature."""
    columns: Columns = [
        ("", itemgetter("name")),
        ("accuracy", _accuracy),
        ("95 %", _accuracy_band),
        ("over T = 1", _gain),
        ("log p", _number_of("logprob")),
        ("tokens", _number_of("length", 1)),
        ("KL to base", _number_of("kl")),
        ("pass@n", _passed),
        ("seconds", _number_of("seconds", 1)),
    ]
    return _table(columns, _rows_of(study, "decoding"))


def selection_table(study: Row) -> str:
    """Every selector at every N."""
    own: dict[str, dict[int, Row]] = {}
    for row in _rows_of(study, "selection"):
        own.setdefault(row["name"], {})[row["n"]] = row
    # every N that all selectors have
    grid = sorted(list(own.values())[-1])
    columns: Columns = [
        ("accuracy at N =", itemgetter("name")),
        *((str(n), lambda row, n=n: _accuracy(own[row["name"]][n])) for n in grid),
        (f"95 % at {grid[-1]}", _accuracy_band),
        ("over T = 1", _gain),
        ("log p", _number_of("logprob")),
        ("length", _number_of("length", 1)),
        ("KL at most", _number_of("kl_at_most")),
        ("tokens drawn", _number_of("tokens", 0)),
    ]
    return _table(columns, [by_n[grid[-1]] for by_n in own.values()])


def selection_facts_table(study: Row) -> str:
    """What selectors say beside their choice."""
    words = {
        "effective_samples": "effective samples",
        "n_used": "samples used",
        "certified": "certified share",
        "accepted": "accepted share",
    }
    columns: Columns = [
        ("", itemgetter("name")),
        ("N", lambda row: str(row["n"])),
        ("", lambda row: words[row["fact"]]),
        ("mean", _number_of("value")),
    ]
    facts = [
        {"name": row["name"], "n": row["n"], "fact": fact, "value": value}
        for row in _rows_of(study, "selection")
        for fact, value in row["facts"].items()
    ]
    return _table(columns, facts)


def power_table(study: Row) -> str:
    """Samplers of p^alpha beside best-of-N of as many tokens."""

    def difference(row: Row) -> str:
        rival = row["equal_cost"]
        return f"{rival['difference_points']:+.1f} ({_band(rival['ci95'], 1)})"

    columns: Columns = [
        ("", itemgetter("name")),
        ("costs as", lambda row: f"N = {row['n']}"),
        ("accuracy", _accuracy),
        ("95 %", _accuracy_band),
        ("best-of-N there", lambda row: _accuracy(row["equal_cost"])),
        ("difference", difference),
        ("p", lambda row: _p(row["equal_cost"]["p"])),
        ("log p", _number_of("logprob")),
        ("tokens", _number_of("tokens", 0)),
        ("KL to base", _number_of("kl")),
        ("seconds", _number_of("seconds", 1)),
    ]
    return _table(columns, _rows_of(study, "power"))


def training_table(study: Row) -> str:
    """Trained models, without any search."""

    def gap_closed(row: Row) -> str:
        gap = row["gap_closed"]
        return DASH if gap is None else f"{100 * gap['share']:.0f} % ({_band(gap['ci95'])})"

    def seconds(row: Row) -> str:
        cost = row["training"]
        return f"{cost['seconds']:,.0f} (fit {cost['seconds_of_fitting']:,.0f})"

    columns: Columns = [
        ("", itemgetter("name")),
        ("accuracy", _accuracy),
        ("95 %", _accuracy_band),
        ("by seed", lambda row: " ".join(map(_percent, row["by_seed"]))),
        ("gap closed", gap_closed),
        ("log p", _number_of("logprob")),
        ("tokens", _number_of("length", 1)),
        ("KL to base", _number_of("kl")),
        ("pass@n", _passed),
        ("drawn", lambda row: f"{row['training']['tokens_drawn']:,}"),
        ("fitted", lambda row: f"{row['training']['tokens_fitted']:,}"),
        ("seconds to train", seconds),
    ]
    return _table(columns, _rows_of(study, "training"))


def rounds_table(study: Row) -> str:
    """Rounds of XPO: which was kept, and why."""
    columns: Columns = [
        ("", itemgetter("method")),
        ("seed", lambda row: str(row["seed"])),
        ("round", lambda row: "base" if row["round"] == 0 else str(row["round"])),
        ("J_beta", _number_of("value", 3)),
        ("", lambda row: "kept" if row["kept"] else ""),
        ("mean e^2", _number_of("square", 3)),
        ("optimism", _number_of("optimism_term", 3)),
    ]
    return _table(columns, study["rounds"])


def auroc_table(study: Row) -> str:
    """Every reward within prompts."""
    columns: Columns = [
        ("AUROC within prompts", itemgetter("reward")),
        ("mean", _number_of("auroc", 3)),
        ("95 %", lambda row: _bounds(row["ci95"], 3)),
        ("of all pairs", _number_of("pooled", 3)),
        ("prompts", lambda row: str(row["prompts"])),
    ]
    return _table(columns, study["auroc"])


def covariance_table(study: Row) -> str:
    """True and self reward within prompts."""

    def share_positive(row: Row) -> str:
        return DASH if row["share_positive"] is None else _percent(row["share_positive"])

    columns: Columns = [
        ("covariance with the grade", itemgetter("reward")),
        ("mean", _number_of("mean", 4)),
        ("95 %", lambda row: _bounds(row["ci95"], 4)),
        ("points per deviation", _number_of("per_sd_points", 1)),
        ("prompts above 0, %", share_positive),
    ]
    return _table(columns, study["covariance"])


def under_power_table(study: Row) -> str:
    """The slope of the accuracy in alpha."""
    columns: Columns = [
        ("alpha", lambda row: f"{row['alpha']:g}"),
        ("accuracy", _accuracy),
        ("slope", _number_of("mean", 4)),
        ("95 %", lambda row: _bounds(row["ci95"], 4)),
        ("effective samples", _number_of("effective_samples", 1)),
    ]
    return _table(columns, study["under_power"])


def stages_table(study: Row) -> str:
    """Every run with its command."""
    columns: Columns = [
        ("run", itemgetter("stage")),
        ("seed", lambda row: DASH if row["seed"] is None else str(row["seed"])),
        ("seconds", _number_of("seconds", 1)),
        ("command", lambda row: f"`{row['command']}`"),
    ]
    return _table(columns, study["stages"])


def _table(columns: Columns, rows: Sequence[Row]) -> str:
    lines = [
        [head for head, _ in columns],
        ["---", *["---:"] * (len(columns) - 1)],
        *([cell(row) for _, cell in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _rows_of(study: Row, group: str) -> list[Row]:
    return [row for row in study["rows"] if row["group"] == group]


def _accuracy(row: Row) -> str:
    return _percent(row["accuracy"])


def _accuracy_band(row: Row) -> str:
    return _band(row["ci95"])


def _gain(row: Row) -> str:
    return f"{row['gain_points']:+.1f} ({_band(row['ci95_of_gain'], 1)})"


def _passed(row: Row) -> str:
    passed = row["pass"]
    return DASH if passed is None else f"{_percent(passed['share'])} @{passed['n']}"


def _number_of(key: str, digits: int = 2) -> Callable[[Row], str]:
    """The cell of a number, a dash where a row has none."""
    return lambda row: _fixed(row.get(key), digits)


def _fixed(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _bounds(ci95: Sequence[float | None] | None, digits: int) -> str:
    return DASH if ci95 is None else " to ".join(_fixed(x, digits) for x in ci95)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _band(ci95: Sequence[float | None], scale: int = 100) -> str:
    """Low to high, in percent."""
    return " to ".join(DASH if x is None else f"{scale * x:.1f}" for x in ci95)


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def figure_files(study: Row) -> dict[str, str]:
    """File names and contents."""
    drawn: dict[str, Callable[[Row], Figure]] = {
        "selection": selection_figure,
        "power": power_figure,
        "training": training_figure,
        "auroc": auroc_figure,
        "covariance": covariance_figure,
    }
    files = {}
    for name, draw in drawn.items():
        with style.context(["default", RC]):
            files[f"{name}.svg"] = svg(draw(study), name, paper=PAPER) + "\n"
    return files


def selection_figure(study: Row) -> Figure:
    """Accuracy against N of a few selectors, with greedy and one sample."""
    figure, axes = panel("Accuracy, %")
    ends = _references(axes, study)
    grid: list[int] = []
    for i, name in enumerate(CURVES):
        rows = [row for row in study["rows"] if row["name"] == name and row["n"]]
        grid = [row["n"] for row in rows] if len(rows) > len(grid) else grid
        color, marker = look(i)
        _curve(axes, rows, "n", color, marker)
        ends.append(End(100 * rows[-1]["accuracy"], name.replace("best-of-N, ", ""), color))
    against_n(axes, grid)
    name_ends(axes, ends)
    return figure


def power_figure(study: Row) -> Figure:
    """Accuracy against completion tokens of one answer: power samplers beside best-of-N."""
    figure, axes = panel("Accuracy, %")
    ends = _references(axes, study)
    best = [row for row in study["rows"] if row["name"] == CURVES[0]]
    power = _rows_of(study, "power")
    names = dict.fromkeys(row["name"] for row in power)
    series = {"best-of-N": best} | {x: [row for row in power if row["name"] == x] for x in names}
    for i, (name, rows) in enumerate(series.items()):
        color, marker = look(i)
        _curve(axes, rows, "tokens", color, marker)
        ends.append(End(100 * rows[-1]["accuracy"], name.partition(",")[0], color))
    against_n(axes, [round(row["tokens"]) for row in best])
    axes.set_xlabel("Completion tokens for one answer")
    name_ends(axes, ends)
    return figure


def training_figure(study: Row) -> Figure:
    """Accuracy of each trained model at T = 1 and greedy, beside the base's."""
    rows = _rows_of(study, "training")
    names = list(dict.fromkeys(row["name"].partition(",")[0] for row in rows))
    base = {row["name"]: row for row in _rows_of(study, "decoding")}
    goal = _goal(study)
    of = {row["name"]: row for row in rows}
    figure, axes = _dots(["base", *names], "Accuracy, %")
    for i, label in enumerate(("T = 1", "greedy")):
        color, marker = look(i)
        lines = [base[label], *(of[f"{name}, {label}"] for name in names)]
        _intervals(axes, lines, color, marker, shift=0.16 * (1 - 2 * i))
        axes.plot([], [], color=color, marker=marker, ls="", label=label)
    axes.axvline(100 * goal["accuracy"], color=INK, lw=0.9, ls=":", label=f"best-of-{goal['n']}")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, 1.15), ncols=3)
    return figure


def auroc_figure(study: Row) -> Figure:
    """AUROC within prompts of every reward."""
    rows = [row for row in study["auroc"] if row["auroc"] is not None and row["ci95"]]
    figure, axes = _dots([row["reward"] for row in rows], "AUROC within prompts")
    for y, row in enumerate(rows):
        axes.plot(row["ci95"], [y, y], color=SERIES[0], lw=1.4)
        axes.plot(row["auroc"], y, color=SERIES[0], marker="o", ms=5)
    axes.axvline(0.5, color=INK, lw=0.9, ls=":")
    return figure


def covariance_figure(study: Row) -> Figure:
    """Covariance of grade and log-prob of each puzzle, against the accuracy of one sample."""
    known = [row for row in study["by_prompt"] if row["covariance"] is not None]
    figure, axes = panel("Covariance of grade and log-prob, nats")
    x, y = (np.array([row[name] for row in known]) for name in ("accuracy", "covariance"))
    axes.axhline(0, color=INK, lw=0.9)
    axes.plot(100 * x, y, color=SERIES[0], marker="o", ms=3.5, ls="", alpha=0.55)
    mean = float(y.mean()) if len(y) else 0.0
    axes.axhline(mean, color=SERIES[1], lw=1.2, ls="--")
    axes.set_xlabel("Accuracy of one sample of the puzzle, %")
    name_ends(axes, [End(mean, f"mean {mean:+.3f}", SERIES[1])])
    return figure


def _goal(study: Row) -> Row:
    named = (row for row in study["rows"] if row["name"] == CURVES[0])
    return next(row for row in named if row["n"] == study["target_n"])


def _references(axes: Axes, study: Row) -> list[End]:
    """Greedy decoding and one sample, as lines across."""
    ends = []
    for name, dash in (("greedy", "--"), ("T = 1", ":")):
        (row,) = (r for r in _rows_of(study, "decoding") if r["name"] == name)
        axes.axhline(100 * row["accuracy"], color=INK, lw=0.9, ls=dash)
        ends.append(End(100 * row["accuracy"], name, INK))
    return ends


def _curve(axes: Axes, rows: Sequence[Row], x: str, color: str, marker: str) -> None:
    x_N = [row[x] for row in rows]
    low_N, high_N = 100 * np.array([row["ci95"] for row in rows]).T
    axes.plot(x_N, [100 * row["accuracy"] for row in rows], color=color, marker=marker, ms=4.5)
    axes.fill_between(x_N, low_N, high_N, color=color, alpha=0.1, lw=0)


def _dots(names: Sequence[str], xlabel: str) -> tuple[Figure, Axes]:
    """A panel of one line a name, downwards."""
    figure, axes = panel("")
    axes.set_position((0.32, 0.15, 0.64, 0.73))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=RULE, lw=0.6)
    axes.set_xlabel(xlabel)
    return figure, axes


def _intervals(axes: Axes, rows: Sequence[Row], color: str, marker: str, *, shift: float) -> None:
    for y, row in enumerate(rows):
        axes.plot([100 * x for x in row["ci95"]], [y - shift] * 2, color=color, lw=1.4)
        axes.plot(100 * row["accuracy"], y - shift, color=color, marker=marker, ms=5)
