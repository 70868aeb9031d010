"""How far two engines' log-probs of the same tokens are apart, and what that does to a ratio.

Engines     `forward_logprobs`, `server_logprobs`, `kept_logprobs`: log-probs of given completions
            by engines other than ours
Comparison  `pair`, `compare`, `worst`, `is_within`
Report      `in_context`, `format_parity`: as JSON and as text

    d[s] = ours[s] - theirs[s],   r[s] = exp(d[s]) = p_ours / p_theirs

With tokens drawn from `theirs` (the sampler) and `ours` the trainer, r is the importance ratio of
off-policy training, and

    k1 = mean(-d),   k3 = mean(r - 1 - d)

both estimate KL(theirs || ours), k3 with less variance and never below 0 (Schulman 2020,
"Approximating KL divergence"). A token with |r - 1| > clip is one that PPO's clip acts on, though
not a step was taken. S tokens, N completions.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from sharpen.errors import InputError, SharpenError, check_value
from sharpen.sampling.endpoint import EndpointClient, EndpointError, map_concurrently
from sharpen.scoring.model_access import evaluating, input_device

if TYPE_CHECKING:
    import transformers

Prompts = Sequence[Sequence[int]]
Completions = Sequence[Sequence[Sequence[int]]]
Nested = Sequence[Sequence[Sequence[float]]]
Measure = Literal["max", "mean", "p99"]

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
# edges of |d| in nats: below what fp32 resolves, ..., above what any rounding does
EDGES = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))
BAR = 40  # characters of the longest one
AROUND = 12  # tokens of context on either side


def forward_logprobs(
    model: "transformers.PreTrainedModel", prompts: Prompts, completions: Completions
) -> list[list[list[float]]]:
    """Of a plain forward of transformers: each sequence whole and alone, log-softmax in fp32.

    The logits of one sequence are held at a time.
    """
    device = input_device(model)

    def one(prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        if not completion:
            return []
        ids = torch.tensor([[*prompt, *completion]], device=device)
        logits_TV = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        target_T = ids[0, len(prompt) :, None].to(logits_TV.device)
        return logits_TV.float().log_softmax(dim=1).gather(1, target_T)[:, 0].tolist()

    with torch.no_grad(), evaluating(model):
        return [
            [one(prompt, completion) for completion in group]
            for prompt, group in zip(prompts, completions, strict=True)
        ]


def server_logprobs(
    client: EndpointClient,
    model: str,
    prompts: Prompts,
    completions: Completions,
    *,
    concurrency: int = 8,
    progress: Callable[[int], object] = lambda n: None,
) -> list[list[list[float]]]:
    """Of a completions endpoint, asked to echo prompt and completion as token ids with log-probs.

    Args:
        client: Where it is.
        model: Its name there.
        prompts: Token ids.
        completions: Token ids.
        concurrency: Requests at a time.
        progress: Told 1 for each sequence answered.

    Raises:
        EndpointError: If it does not answer, or not with a log-prob of each token, a number.
    """
    pairs = [
        (prompt, completion)
        for prompt, group in zip(prompts, completions, strict=True)
        for completion in group
    ]

    def ask(i: int) -> list[float]:
        prompt, completion = pairs[i]
        body = {
            "model": model,
            "prompt": [*prompt, *completion],
            "echo": True,
            # some servers refuse 0; what they add is cut off
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": 1,
        }
        answer = client.post("/completions", body)
        return _echoed(client.url, answer, len(prompt), len(completion))

    found: dict[int, list[float]] = {}
    for i, result in map_concurrently(ask, range(len(pairs)), concurrency):
        if isinstance(result, Exception):
            raise result
        found[i] = result
        progress(1)
    flat = (found[i] for i in itertools.count())
    return [[next(flat) for _ in group] for group in completions]


def _echoed(url: str, answer: dict[str, Any], n_prompt: int, n_completion: int) -> list[float]:
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    end = n_prompt + n_completion
    # one more where the server had to generate
    if not isinstance(values, list) or len(values) not in (end, end + 1):
        got = "none" if not isinstance(values, list) else str(len(values))
        raise EndpointError(
            f"`endpoint` {url}: must echo {end} tokens with their log-probs, got {got}; use a "
            "server that takes token ids, `echo` and `logprobs`."
        )
    fix = "use a server that answers as OpenAI's completions do."
    name = f"`endpoint` {url}: `token_logprobs`"
    return [_nats(f"{name}[{i}]", values[i], fix, EndpointError) for i in range(n_prompt, end)]


def kept_logprobs(places: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[list[list[float]]]:
    """Those that the sampler kept, from records of `sharpen sample`; null is NaN.

    Args:
        places: Where each record stands.
        rows: The records.

    Raises:
        InputError: If a record has none, or something else among them.
    """
    kept: list[list[list[float]]] = []
    for place, row in zip(places, rows, strict=True):
        groups = row.get("logprobs")
        if "completion" in row and isinstance(groups, list):
            groups = [groups]
        if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
            raise InputError(
                f"{place}: must have the sampler's own `logprobs`; give a file of "
                "`sharpen sample`, or another `--against`."
            )
        fix = "give the file as `sharpen sample` wrote it."
        kept.append([])
        for g, group in enumerate(groups):
            name = f"{place}: `logprobs`[{g}]"
            numbers = [_nats(f"{name}[{i}]", x, fix, InputError) for i, x in enumerate(group)]
            kept[-1].append(numbers)
    return kept


# value: JSON of others
def _nats(name: str, value: Any, fix: str, error: type[SharpenError]) -> float:
    """A log-prob; NaN for null."""
    # bool is an int to Python alone
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number and value is not None:
        raise error(f"{name} must be a number or null, got {value!r}; {fix}")
    return float("nan") if value is None else float(value)


@dataclass(frozen=True)
class Place:
    """One token: completion g of prompt p, position t in it."""

    p: int
    g: int
    t: int


@dataclass(frozen=True, eq=False)
class Pairs:
    """Log-probs of the same tokens, flat.

    Attributes:
        ours: fp64 [S], nats.
        theirs: fp64 [S], nats.
        owner: int64 [S]: which completion, counted over all prompts.
        places: S of them.
        n_completions: N, empty ones too.
    """

    ours: np.ndarray
    theirs: np.ndarray
    owner: np.ndarray
    places: list[Place]
    n_completions: int

    @property
    def difference(self) -> np.ndarray:
        """d, fp64 [S]; 0 where both are the same infinity, NaN where either is NaN."""
        same = self.ours == self.theirs
        with np.errstate(invalid="ignore"):
            return np.where(same, 0.0, self.ours - self.theirs)


def pair(ours: Nested, theirs: Nested) -> Pairs:
    """Put the log-probs of two engines beside each other.

    Args:
        ours: Of each token of each completion of each prompt, nats.
        theirs: The same of another engine.

    Raises:
        InputError: If they are not of the same tokens.
    """
    lengths = [[[len(tokens) for tokens in group] for group in side] for side in (ours, theirs)]
    if lengths[0] != lengths[1]:
        raise InputError(
            "the two engines must rate the same tokens, got other numbers of log-probs; were the "
            "samples tokenised by another tokenizer?"
        )
    length_N = np.array([n for group in lengths[0] for n in group], dtype=np.int64)
    return Pairs(
        _flat(ours),
        _flat(theirs),
        np.repeat(np.arange(len(length_N)), length_N),
        [
            Place(p, g, t)
            for p, group in enumerate(lengths[0])
            for g, n in enumerate(group)
            for t in range(n)
        ],
        len(length_N),
    )


def _flat(side: Nested) -> np.ndarray:
    return np.array([x for group in side for tokens in group for x in tokens], dtype=np.float64)


def compare(pairs: Pairs, *, clip: float = 0.2) -> dict[str, Any]:
    """The comparison in numbers, ready for JSON.

    Tokens that either engine calls NaN are counted (`n_nan`, and `n_nan_one_side`) and left out.
    Infinite differences stay: they are a maximum that no tolerance holds.

    Args:
        pairs: At least one token.
        clip: PPO's epsilon.

    Raises:
        InputError: If there is nothing to compare, or `clip` is not positive.
    """
    check_value("clip", clip, clip > 0, "positive")
    nan_ours, nan_theirs = np.isnan(pairs.ours), np.isnan(pairs.theirs)
    known = ~(nan_ours | nan_theirs)
    if not known.any():
        got = f"{len(known)}, all of them NaN" if len(known) else "empty completions"
        raise InputError(f"there must be a token to compare, got {got}.")
    d = pairs.difference[known]
    size = np.abs(d)
    sums = np.bincount(pairs.owner[known], weights=d, minlength=pairs.n_completions)
    # an impossible token makes them infinite; numpy's warnings say no more than the numbers do
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = np.exp(d)
        k3 = np.where(np.isinf(d), np.inf, ratio - 1 - d)
        return {
            "n_tokens": int(known.sum()),
            "n_completions": pairs.n_completions,
            "n_nan": int((~known).sum()),
            "n_nan_one_side": int((nan_ours ^ nan_theirs).sum()),
            "max": float(size.max()),
            "mean": float(size.mean()),
            "signed_mean": float(d.mean()),
            "rms": float(np.sqrt((d**2).mean())),
            "percentiles": {
                # a value that occurs, also among infinite ones
                f"p{q:g}": float(np.percentile(size, q, method="inverted_cdf"))
                for q in PERCENTILES
            },
            "histogram": _histogram(size),
            "completion_max": float(np.abs(sums).max()),
            "completion_mean": float(np.abs(sums).mean()),
            "ratio": {
                "min": float(ratio.min()),
                "max": float(ratio.max()),
                "clip": clip,
                "outside_clip": float((np.abs(ratio - 1) > clip).mean()),
                "k1": float(-d.mean()),
                "k3": float(k3.mean()),
            },
        }


def worst(pairs: Pairs, k: int) -> list[int]:
    """Indices of the k tokens furthest apart, furthest first; NaN on one side before all.

    Tokens that both engines call NaN, or that agree to the bit, are not among them.
    """
    size = np.abs(pairs.difference)
    one_side = np.isnan(pairs.ours) ^ np.isnan(pairs.theirs)
    size = np.where(one_side, np.inf, np.nan_to_num(size, nan=0.0, posinf=np.inf))
    # by size, then by place, so that a report does not depend on the sort
    order = np.lexsort((np.arange(len(size)), ~one_side, -size))
    return [int(i) for i in order[:k] if size[i] > 0]


def is_within(found: dict[str, Any], tolerance: float, measure: Measure) -> bool:
    """Whether `measure` of the differences is at most `tolerance`, and no NaN is on one side."""
    return bool(_measured(found, measure) <= tolerance) and found["n_nan_one_side"] == 0


def _measured(found: dict[str, Any], measure: Measure) -> float:
    return found["percentiles"]["p99"] if measure == "p99" else found[measure]


def _histogram(size: np.ndarray) -> list[dict[str, Any]]:
    """Tokens by decade: [low, high), the first of exactly 0 alone."""
    rows = [{"from": 0.0, "to": 0.0, "n": int((size == 0).sum())}]
    for low, high in itertools.pairwise(EDGES):
        inside = (size > 0) & (size >= low) & ((size < high) | (high == np.inf))
        rows.append({"from": low, "to": high, "n": int(inside.sum())})
    return rows


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
    names = ("ours", "theirs", "difference")
    return {
        "completion": place.g,
        "position": place.t,
        "token_id": completion[place.t],
        "before": decode(before),
        "token": decode([completion[place.t]]),
        "after": decode(after),
        **{name: finite(float(getattr(pairs, name)[index])) for name in names},
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
            f"  {_short(one['difference'])} ({_short(one['ours'], 7)} and "
            f"{_short(one['theirs'], 7)})  "
            f"{one['place']}, completion {one['completion']}, token {one['position']}",
            f"    {_shown(one['before'])}[{_shown(one['token'])}]{_shown(one['after'])}",
        ]
    verdict = "within" if report["is_within"] else "ABOVE"
    value = _short(_measured(found, report["measure"]))
    lines += [
        "",
        f"{report['measure']} {value} is {verdict} the tolerance {report['tolerance']:g}"
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


def _short(value: Any, digits: int = 3) -> str:
    return value if isinstance(value, str) else f"{value:.{digits}g}"


def _shown(text: str) -> str:
    return text.replace("\n", "\\n")
