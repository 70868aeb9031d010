"""The tables of a study in Markdown."""

from collections.abc import Sequence
from typing import Any

from .page import Row, Study

DASH = "\N{EN DASH}"


def decoding_table(study: Study) -> str:
    """Greedy, one sample, low temperature."""
    heads = [
        "", "accuracy", "95 %", "over T = 1", "log p", "tokens", "KL to base", "pass@n", "seconds",
    ]  # fmt: skip
    return "## Without a choice\n\n" + _table(
        heads,
        [
            [
                row["name"], percent(row["accuracy"]), band(row["ci95"]), _gain(row),
                _fixed(row["logprob"]), _fixed(row["length"], 1), _fixed(row["kl"]), _passed(row),
                _fixed(row["seconds"], 1),
            ]
            for row in study["rows"] if row["group"] == "decoding"
        ],
    )  # fmt: skip


def selection_table(study: Study) -> str:
    """Every selector at every N."""
    rows = [row for row in study["rows"] if row["group"] == "selection"]
    # every N that all selectors have
    names = list(dict.fromkeys(row["name"] for row in rows))
    grid = sorted({row["n"] for row in rows if row["name"] == names[-1]})
    heads = [
        "accuracy at N =",
        *map(str, grid),
        f"95 % at {grid[-1]}",
        "over T = 1",
        "log p",
        "length",
        "KL at most",
        "tokens drawn",
    ]
    lines = []
    for name in names:
        own = {row["n"]: row for row in rows if row["name"] == name}
        last = own[grid[-1]]
        lines.append(
            [
                name, *(percent(own[n]["accuracy"]) for n in grid), band(last["ci95"]),
                _gain(last), _fixed(last["logprob"]), _fixed(last["length"], 1),
                _fixed(last.get("kl_at_most")), _fixed(last["tokens"], 0),
            ]
        )  # fmt: skip
    return _table(heads, lines)


def selection_facts_table(study: Study) -> str:
    """What selectors say beside their choice."""
    words = {
        "effective_samples": "effective samples",
        "n_used": "samples used",
        "certified": "certified share",
        "accepted": "accepted share",
    }
    lines = [
        [row["name"], str(row["n"]), words[name], _fixed(value)]
        for row in study["rows"]
        if row["group"] == "selection"
        for name, value in row["facts"].items()
    ]
    return _table(["", "N", "", "mean"], lines)


def power_table(study: Study) -> str:
    """Samplers of p^alpha beside best-of-N of as many tokens."""
    heads = [
        "", "costs as", "accuracy", "95 %", "best-of-N there", "difference", "p", "log p", "tokens",
        "KL to base", "seconds",
    ]  # fmt: skip
    lines = []
    for row in study["rows"]:
        if row["group"] != "power":
            continue
        rival = row["equal_cost"]
        lines.append(
            [
                row["name"], f"N = {row['n']}", percent(row["accuracy"]), band(row["ci95"]),
                percent(rival["accuracy"]),
                f"{rival['difference_points']:+.1f} ({band(rival['ci95'], 1)})", _p(rival["p"]),
                _fixed(row["logprob"]), _fixed(row["tokens"], 0), _fixed(row["kl"]),
                _fixed(row["seconds"], 1),
            ]
        )  # fmt: skip
    return _table(heads, lines)


def training_table(study: Study) -> str:
    """Trained models, without any search."""
    heads = [
        "", "accuracy", "95 %", "by seed", "gap closed", "log p", "tokens", "KL to base", "pass@n",
        "drawn", "fitted", "seconds to train",
    ]  # fmt: skip
    lines = []
    for row in study["rows"]:
        if row["group"] != "training":
            continue
        gap, cost = row["gap_closed"], row["training"]
        closed = DASH if gap is None else f"{100 * gap['share']:.0f} % ({band(gap['ci95'])})"
        lines.append(
            [
                row["name"], percent(row["accuracy"]), band(row["ci95"]),
                " ".join(percent(x) for x in row["by_seed"]), closed, _fixed(row["logprob"]),
                _fixed(row["length"], 1), _fixed(row["kl"]), _passed(row),
                f"{cost['tokens_drawn']:,}", f"{cost['tokens_fitted']:,}",
                f"{cost['seconds']:,.0f} (fit {cost['seconds_of_fitting']:,.0f})",
            ]
        )  # fmt: skip
    note = (
        f"\n\nGap closed: the gain over one sample of the base, as a share of that of "
        f"best-of-{study['target_n']} by log-prob. Drawn and fitted: tokens in training."
    )
    return _table(heads, lines) + note


def rounds_table(study: Study) -> str:
    """Rounds of XPO: which was kept, and why."""
    lines = [
        [
            row["method"], str(row["seed"]), "base" if row["round"] == 0 else str(row["round"]),
            _fixed(row["value"], 3), "kept" if row["kept"] else "", _fixed(row.get("square"), 3),
            _fixed(row.get("optimism_term"), 3),
        ]
        for row in study["rounds"]
    ]  # fmt: skip
    note = (
        "J_beta: mean of log pi_base(y) less beta times the log-ratio of model to base, over "
        "samples of held-out training prompts; the round of the highest is kept. Mean e^2 and "
        "optimism: the two terms of the loss that the fit of the round has left.\n\n"
    )
    heads = ["", "seed", "round", "J_beta", "", "mean e^2", "optimism"]
    return note + _table(heads, lines)


def auroc_table(study: Study) -> str:
    """Every reward within prompts."""
    lines = [
        [
            row["reward"], _fixed(row["auroc"], 3), _plain(row["ci95"]), _fixed(row["pooled"], 3),
            str(row["prompts"]),
        ]
        for row in study["auroc"]
    ]  # fmt: skip
    return _table(["AUROC within prompts", "mean", "95 %", "of all pairs", "prompts"], lines)


def covariance_table(study: Study) -> str:
    """True and self reward within prompts."""
    lines = [
        [
            row["reward"], _fixed(row["mean"], 4), _plain(row["ci95"], 4),
            _fixed(row["per_sd_points"], 1),
            DASH if row["share_positive"] is None else percent(row["share_positive"]),
        ]
        for row in study["covariance"]
    ]  # fmt: skip
    heads = [
        "covariance with the grade",
        "mean",
        "95 %",
        "points per deviation",
        "prompts above 0, %",
    ]
    return _table(heads, lines)


def under_power_table(study: Study) -> str:
    """The slope of the accuracy in alpha."""
    lines = [
        [
            f"{row['alpha']:g}", percent(row["accuracy"]), _fixed(row["mean"], 4),
            _plain(row["ci95"], 4), _fixed(row["effective_samples"], 1),
        ]
        for row in study["under_power"]
    ]  # fmt: skip
    note = (
        "The covariance with log p under p^alpha is the slope of the accuracy in alpha, prompt by "
        "prompt; here by weights of the samples.\n\n"
    )
    heads = ["alpha", "accuracy", "slope", "95 %", "effective samples"]
    return note + _table(heads, lines)


def stages_table(study: Study) -> str:
    """Every run with its command."""
    lines = [
        [stage["stage"], DASH if stage["seed"] is None else str(stage["seed"]),
         _fixed(stage["seconds"], 1), f"`{stage['command']}`"]
        for stage in study["stages"]
    ]  # fmt: skip
    return _table(["run", "seed", "seconds", "command"], lines)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rule, *lines])


def percent(share: float) -> str:
    """A fraction of 1 in percent."""
    return f"{100 * share:.1f}"


def band(ci95: Sequence[float | None], scale: int = 100) -> str:
    """Low to high, in percent."""
    return " to ".join(DASH if x is None else f"{scale * x:.1f}" for x in ci95)


def _plain(ci95: Sequence[float | None] | None, digits: int = 3) -> str:
    return DASH if ci95 is None else " to ".join(_fixed(x, digits) for x in ci95)


def _fixed(value: float | None, digits: int = 2) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _gain(row: Row) -> str:
    return f"{row['gain_points']:+.1f} ({band(row['ci95_of_gain'], 1)})"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _passed(row: Row) -> str:
    passed: dict[str, Any] | None = row["pass"]
    return DASH if passed is None else f"{percent(passed['share'])} @{passed['n']}"
