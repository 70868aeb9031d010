"""A comparison of two engines as text, and its worst tokens in context."""

from collections.abc import Callable, Sequence
from typing import Any

from .parity import Pairs

BAR = 40
AROUND = 12  # tokens of context on either side


def in_context(
    pairs: Pairs,
    index: int,
    prompt: Sequence[int],
    completion: Sequence[int],
    decode: Callable[[list[int]], str],
) -> dict[str, Any]:
    """One token with what stands around it, for JSON and for people.

    Args:
        pairs: Where the token is.
        index: Which.
        prompt: Ids of its prompt.
        completion: Ids of its completion.
        decode: Ids to text, special tokens shown.
    """
    place = pairs.places[index]
    before = [*prompt, *completion[: place.t]][-AROUND:]
    after = list(completion[place.t + 1 : place.t + 1 + AROUND])
    numbers = {
        "ours": pairs.ours[index],
        "theirs": pairs.theirs[index],
        "difference": pairs.difference[index],
    }
    return {
        "completion": place.g,
        "position": place.t,
        "token_id": completion[place.t],
        "before": decode(before),
        "token": decode([completion[place.t]]),
        "after": decode(after),
        **{name: finite(float(value)) for name, value in numbers.items()},
    }


def finite(value: Any) -> Any:
    """What JSON can say of a number; infinity and NaN as text."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def format_parity(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    found, names = report["differences"], f"{report['ours']} - {report['theirs']}"
    ratio = found["ratio"]
    percentiles = "  ".join(f"{name} {_short(x)}" for name, x in found["percentiles"].items())
    nan = f", {found['n_nan']} NaN ({found['n_nan_one_side']} on one side)"
    lines = [
        f"{names}: {found['n_tokens']:,} tokens of {found['n_completions']:,} completions"
        + (nan if found["n_nan"] else ""),
        f"|difference| a token, nats: max {_short(found['max'])}  mean {_short(found['mean'])}  "
        f"{percentiles}",
        f"signed mean {_short(found['signed_mean'])}, rms {_short(found['rms'])}; of a "
        f"completion's sum: max {_short(found['completion_max'])}, mean "
        f"{_short(found['completion_mean'])}",
        f"ratio: {ratio['min']:.6g} to {ratio['max']:.6g}, "
        f"{100 * ratio['outside_clip']:.3g} % outside 1 +- {ratio['clip']:g}; "
        f"KL k1 {_short(ratio['k1'])}, k3 {_short(ratio['k3'])}",
        "",
        *_bars(found["histogram"]),
    ]
    if report["worst"]:
        lines += ["", "furthest apart:"]
    for one in report["worst"]:
        lines += [
            f"  {_short(one['difference'])} ({_long(one['ours'])} and {_long(one['theirs'])})  "
            f"{one['place']}, completion {one['completion']}, token {one['position']}",
            f"    {_shown(one['before'])}[{_shown(one['token'])}]{_shown(one['after'])}",
        ]
    verdict = "within" if report["is_within"] else "ABOVE"
    value = found["percentiles"]["p99"] if report["measure"] == "p99" else found[report["measure"]]
    lines += [
        "",
        f"{report['measure']} {_short(value)} is {verdict} the tolerance {report['tolerance']:g}"
        + (", and NaN is on one side" if found["n_nan_one_side"] else ""),
    ]
    return "\n".join(lines)


def _bars(histogram: list[dict[str, Any]]) -> list[str]:
    most = max(row["n"] for row in histogram) or 1
    lines = []
    for row in histogram:
        name = "exactly 0" if row["to"] == 0 else f"{row['from']:g} to {row['to']:g}"
        bar = "#" * -(-BAR * row["n"] // most)
        lines.append(f"  {name:>16s} {row['n']:>9,} {bar}".rstrip())
    return lines


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _long(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.7g}"


def _shown(text: str) -> str:
    return text.replace("\n", "\\n")
