"""Statistics of tokens to one reward per completion; higher is better.

A reward is a pure function, and its parameters say what it needs: a token statistic by its name,
`offsets`, `groups` or `valid`, or else an option that the caller gives. `REWARDS` holds them all.

S scored tokens, N completions of all prompts together, P prompts. Completion n owns the scored
tokens offsets[n] ... offsets[n + 1] - 1, prompt p the completions groups[p] ... groups[p + 1] - 1.
Sums run over fp64 in token order, so a reward has the same bits in any batch. An empty completion
gets 0 from every reward of tokens and is never chosen; NaN stays in its completion. The rewards of
answers change with the set of completions, so a figure of best-of-k needs one vote per subset.

The confidences are DeepConf's. That of a token is minus the mean of the k = 20 largest log-probs
before it, in nats: the more the first token outweighs the others, the larger. `segment_reduce`
takes the means over windows of neighbours. `window` counts tokens (an int) or is a part of the
completion (a float in (0, 1]); a window longer than the completion is all of it. The paper's 2048
tokens would make every short output's windows its mean; the default is a tenth.
"""

import inspect
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen_kernels import segment_reduce
from sharpen_kernels.segment_reduce import SequenceStatistic

LAYOUT = ("offsets", "groups", "valid")
WINDOW = 0.1  # of the completion; chosen

# `bounds` is N + 1: where the tokens of each completion start, then S
PerToken = Float32[Tensor, " S"]
Bounds = Int64[Tensor, " bounds"]
PerCompletion = Float32[Tensor, " bounds-1"]


def sequence_logprob(logprob: PerToken, offsets: Bounds) -> PerCompletion:
    """Log-probability of each completion, in nats: the self-reward of sharpening.

        reward[n] = sum_s logprob[s] = log p(completion n | its prompt)

    Prefers short completions: each further token can only lower it.

    Source:
        Huang et al. 2024, arXiv:2412.01951, Eq. 2.

    Example:
        >>> sequence_logprob(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 3]))
        tensor([-3., -4.])
    """
    return _sum(logprob, offsets).float()


def mean_logprob(logprob: PerToken, offsets: Bounds) -> PerCompletion:
    """Log-probability per token, in nats: minus the logarithm of the perplexity.

        reward[n] = sum_s logprob[s] / length[n]

    Not the logarithm of a probability. Prefers long completions: late tokens are easier.

    Source:
        Huang et al. 2024, arXiv:2412.01951, section 2.

    Example:
        >>> mean_logprob(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 3]))
        tensor([-1.5000, -4.0000])
    """
    return _mean(logprob, offsets).float()


def neg_perplexity(logprob: PerToken, offsets: Bounds) -> PerCompletion:
    """Minus the perplexity of each completion: a number of equally likely tokens, at least 1.

        reward[n] = -exp(-sum_s logprob[s] / length[n])

    Perplexity with its sign turned, so that higher is better; log-probs in nats. Orders completions
    as `mean_logprob` does and prefers long ones as it does; only its scale differs, which soft
    choices and weighted votes feel.

    Source:
        Jelinek et al. 1977; a baseline in Kang et al. 2025, arXiv:2502.18581.

    Example:
        >>> logprob = torch.tensor([0.5, 0.125, 0.25]).log()
        >>> neg_perplexity(logprob, torch.tensor([0, 2, 3]))
        tensor([-4., -4.])
    """
    return torch.where(offsets.diff() > 0, -(-_mean(logprob, offsets)).exp(), 0.0).float()


def min_token_logprob(logprob: PerToken, offsets: Bounds) -> PerCompletion:
    """Log-probability of the least likely token of each completion, in nats.

        reward[n] = min_s logprob[s]

    One doubtful step is enough to sink a chain of steps. Prefers short completions: a further token
    can only lower it.

    Source:
        The lowest group confidence of Fu et al. 2025, arXiv:2508.15260, at the token drawn.

    Example:
        >>> min_token_logprob(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 3]))
        tensor([-2., -4.])
    """
    least = segment_reduce({"logprob": logprob}, offsets, stats=("min",)).sequences["logprob"].min
    assert least is not None
    return torch.where(offsets.diff() > 0, least, 0.0)


def mean_self_certainty(self_certainty: PerToken, offsets: Bounds) -> PerCompletion:
    """Mean divergence of the model's distributions from the uniform one, in nats.

        reward[n] = sum_s KL(uniform || p_s) / length[n]

    Looks at the distributions before each token and not at the token drawn. Nearly free of length.

    Source:
        Kang, Zhao and Song 2025, arXiv:2502.18581.

    Example:
        >>> mean_self_certainty(torch.tensor([2.0, 4.0]), torch.tensor([0, 2]))
        tensor([3.])
    """
    return _mean(self_certainty, offsets).float()


def neg_entropy(entropy: PerToken, offsets: Bounds) -> PerCompletion:
    """Minus the mean entropy of the model's distributions, in nats.

        reward[n] = -sum_s H(p_s) / length[n]

    Prefers long completions: late tokens are easier.

    Source:
        Agarwal et al. 2025, arXiv:2505.15134; a baseline in Kang et al. 2025, arXiv:2502.18581.

    Example:
        >>> neg_entropy(torch.tensor([0.5, 1.5]), torch.tensor([0, 2]))
        tensor([-1.])
    """
    return -_mean(entropy, offsets).float()


def confidence(topk_mean: PerToken, offsets: Bounds) -> PerCompletion:
    """Mean confidence of the tokens, in nats.

        reward[n] = sum_s C[s] / length[n],      C[s] = -mean of the top-k log-probs at s

    Looks at the distributions and not at the tokens drawn. A mean, so nearly free of length, but
    late tokens are easier: prefers long completions a little.

    Source:
        Fu et al. 2025 (DeepConf), arXiv:2508.15260, average trace confidence.

    Example:
        >>> confidence(torch.tensor([-2.0, -4.0]), torch.tensor([0, 2]))
        tensor([3.])
    """
    return _confidence(topk_mean, offsets, "mean", 1.0)


def confidence_lowest(
    topk_mean: PerToken,
    offsets: Bounds,
    *,
    window: int | float = WINDOW,
) -> PerCompletion:
    """Confidence of the least sure window, in nats.

        reward[n] = min over windows g of mean_{s in g} C[s],      C as in `confidence`

    A window of a fixed number of tokens has more chances to be low in a long completion: prefers
    short ones. A fractional one averages over more tokens there: prefers long ones.

    Args:
        topk_mean: Of each scored token, nats.
        offsets: Where the tokens of each completion start, then S.
        window: Tokens in a window, or their part of the completion.

    Raises:
        InputError: If `window` is neither an int of at least 1 nor a float in (0, 1].

    Source:
        Fu et al. 2025 (DeepConf), arXiv:2508.15260, lowest group confidence.

    Example:
        >>> topk_mean, offsets = torch.tensor([-4.0, -1.0, -3.0, -5.0]), torch.tensor([0, 4])
        >>> confidence_lowest(topk_mean, offsets, window=2)  # of 2.5, 2 and 4
        tensor([2.])
    """
    return _confidence(topk_mean, offsets, "lowest_window", window)


def confidence_bottom(
    topk_mean: PerToken,
    offsets: Bounds,
    *,
    window: int | float = WINDOW,
) -> PerCompletion:
    """Mean confidence of the least sure tenth of the windows, in nats.

        reward[n] = mean of the max(1, floor(W / 10)) lowest of the W windows' means of C

    C as in `confidence`. One window where there are fewer than 20: then it is `confidence_lowest`,
    and depends on length as that does.

    Arguments and errors: as `confidence_lowest`.

    Source:
        Fu et al. 2025 (DeepConf), arXiv:2508.15260, bottom 10 % group confidence.

    Example:
        >>> topk_mean, offsets = -torch.arange(1.0, 31.0), torch.tensor([0, 30])
        >>> confidence_bottom(topk_mean, offsets, window=1)  # of 1, 2 and 3
        tensor([2.])
    """
    return _confidence(topk_mean, offsets, "bottom_windows", window)


def confidence_tail(
    topk_mean: PerToken,
    offsets: Bounds,
    *,
    window: int | float = WINDOW,
) -> PerCompletion:
    """Confidence of the last window, in nats: where the answer stands.

        reward[n] = mean of C[s] over the last tokens of the completion,      C as in `confidence`

    Blind to what came before, so nearly free of length.

    Arguments and errors: as `confidence_lowest`.

    Source:
        Fu et al. 2025 (DeepConf), arXiv:2508.15260, tail confidence.

    Example:
        >>> topk_mean, offsets = torch.tensor([-4.0, -1.0, -3.0, -5.0]), torch.tensor([0, 4])
        >>> confidence_tail(topk_mean, offsets, window=0.5)
        tensor([4.])
    """
    return _confidence(topk_mean, offsets, "tail_window", window)


def majority(
    groups: Int64[Tensor, " bounds"],
    valid: Bool[Tensor, " N"],
    *,
    answers: Sequence[str | None],
) -> Float32[Tensor, " N"]:
    """Share of the prompt's valid completions that give the same answer, in [0, 1].

        reward[n] = #{m valid, of n's prompt: answers[m] = answers[n]} / #{m valid, of n's prompt}

    Blind to length. A completion without an answer gets 0, and counts in the denominator.

    Args:
        groups: Where the completions of each prompt start, then N.
        valid: Which completions vote.
        answers: What each completion answers, None where nothing could be read.

    Raises:
        InputError: If there is not one answer per completion.

    Source:
        Wang et al. 2022, arXiv:2203.11171; as a self-reward in Huang et al., section 5.

    Example:
        >>> groups, valid = torch.tensor([0, 4]), torch.tensor([True, True, True, False])
        >>> majority(groups, valid, answers=["24", "24", None, "7"])
        tensor([0.6667, 0.6667, 0.0000, 0.0000])
    """
    N = len(valid)
    check_one_each("answers", answers, N)
    votes = valid.tolist()
    bounds = groups.tolist()
    share = [0.0] * N
    for first, last in pairwise(bounds):
        n_valid = sum(votes[first:last])
        counts = Counter(answers[n] for n in range(first, last) if votes[n])
        for n in range(first, last):
            if answers[n] is not None and n_valid:
                share[n] = counts[answers[n]] / n_valid
    return torch.tensor(share, dtype=torch.float32)


def perplexity_consistency(
    logprob: Float32[Tensor, " S"],
    offsets: Int64[Tensor, " token_bounds"],
    groups: Int64[Tensor, " bounds"],
    valid: Bool[Tensor, " N"],
    *,
    answers: Sequence[str | None],
    keys: Sequence[Hashable],
) -> Float32[Tensor, " N"]:
    """Log of the probability that the sampled completions give to an answer, in nats.

        reward[n] = log sum_{y in Y: answer(y) = answers[n]} p(y | prompt),
        Y = the distinct valid completions of n's prompt

    A lower bound of log p(answer | prompt), exact once every completion of that answer was drawn:
    unlike a vote's share it counts a completion once, however often it was drawn. Prefers answers
    of short completions, as the summed log-prob does. Without the pruning of improbable completions
    that RPC puts before it.

    Args:
        logprob: Of each scored token, nats.
        offsets: Where the tokens of each completion start, then S.
        groups: Where the completions of each prompt start, then N.
        valid: Which completions count. An empty one, or one whose log-prob is NaN, never does.
        answers: What each completion answers, None where nothing could be read: the reward is -inf.
        keys: Equal for equal completions of a prompt: tuples of their token ids.

    Raises:
        InputError: If there is not one answer and one key per completion.

    Source:
        Zhou et al. 2025 (RPC), arXiv:2502.00511, perplexity consistency.

    Example:
        >>> logprob, offsets = torch.tensor([0.25, 0.25, 0.3, 0.2]).log(), torch.arange(5)
        >>> groups, valid = torch.tensor([0, 4]), torch.tensor([True] * 4)
        >>> keys = [(7,), (7,), (8,), (9,)]
        >>> reward = perplexity_consistency(
        ...     logprob, offsets, groups, valid, answers=["a", "a", "b", "b"], keys=keys
        ... )
        >>> reward.exp()  # "a" was drawn twice, but is one completion
        tensor([0.2500, 0.2500, 0.5000, 0.5000])
    """
    sums = segment_reduce({"logprob": logprob.double()}, offsets).sequences["logprob"].sum
    assert sums is not None
    counts = valid & (offsets.diff() > 0) & ~sums.isnan()
    mass_N = answer_logprob(sums, groups, counts, answers, keys)
    return mass_N.masked_fill(sums.isnan(), float("nan")).float()


def answer_logprob(
    sequence_logprob: Float64[Tensor, " N"],
    groups: Int64[Tensor, " bounds"],
    counts: Bool[Tensor, " N"],
    answers: Sequence[str | None],
    keys: Sequence[Hashable],
) -> Float64[Tensor, " N"]:
    """Log of the summed probability of the distinct completions with the same answer, nats.

    -inf for a completion without an answer, and for an answer that no counted completion gives.
    Arguments as in `perplexity_consistency`; `sequence_logprob` is of whole completions, in nats,
    and `counts` says which are summed over.
    """
    N = len(counts)
    check_one_each("answers", answers, N)
    check_one_each("keys", keys, N)
    logprobs, counted = sequence_logprob.tolist(), counts.tolist()
    found = [-math.inf] * N
    for first, last in pairwise(groups.tolist()):
        of: dict[str | None, list[float]] = defaultdict(list)
        for n in distinct_answers([n for n in range(first, last) if counted[n]], answers, keys):
            of[answers[n]].append(logprobs[n])
        mass = {answer: _logsumexp(terms) for answer, terms in of.items()}
        for n in range(first, last):
            answer = answers[n]
            found[n] = -math.inf if answer is None else mass.get(answer, -math.inf)
    return torch.tensor(found, dtype=torch.float64)


def distinct_answers(
    members: Sequence[int], answers: Sequence[str | None], keys: Sequence[Hashable]
) -> list[int]:
    """Of some completions of one prompt those that have an answer, the first of equal ones."""
    found: dict[tuple[str, Hashable], int] = {}
    for n in members:
        answer = answers[n]
        if answer is not None:
            found.setdefault((answer, keys[n]), n)
    return list(found.values())


def check_one_each(name: str, values: Sequence[object], N: int) -> None:
    """Raise `InputError` unless there is one value per completion."""
    if len(values) != N:
        entry = "answer or None" if name == "answers" else "key"
        raise InputError(
            f"`{name}` must hold one {entry} for each of N={N} completions, "
            f"got {len(values)}; list the completions of all prompts end to end."
        )


def _sum(values: PerToken, offsets: Bounds) -> Float64[Tensor, " bounds-1"]:
    return torch.segment_reduce(values.double(), "sum", offsets=offsets)


def _mean(values: PerToken, offsets: Bounds) -> Float64[Tensor, " bounds-1"]:
    """Mean of the values of each completion, summed in fp64 in token order; 0 of none."""
    return _sum(values, offsets) / offsets.diff().clamp(min=1)


def _confidence(
    topk_mean: PerToken,
    offsets: Bounds,
    how: SequenceStatistic,
    window: int | float,
) -> PerCompletion:
    """The `how` of the token confidences of each completion; 0 of none."""
    # a bool is an int, but no number of tokens
    is_count = isinstance(window, int) and not isinstance(window, bool)
    if not (window >= 1 if is_count else isinstance(window, float) and 0 < window <= 1):
        raise InputError(
            f"`window` must be an int of at least 1 (tokens) or a float in (0, 1] (a part of the "
            f"completion), got {window!r}."
        )
    # + 0.0 turns the -0.0 of a sure token, which would print, into 0.0
    values = {"confidence": -topk_mean + 0.0}
    reduced = segment_reduce(values, offsets, stats=(how,), window=window)
    found = getattr(reduced.sequences["confidence"], how)
    assert isinstance(found, torch.Tensor)
    return found


def _logsumexp(values: Sequence[float]) -> float:
    """Of at least one value."""
    top = max(values)
    if math.isinf(top):
        return top
    # fsum rounds once: the order of the completions does not show
    return top + math.log(math.fsum(math.exp(x - top) for x in values))


REWARDS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        # of the tokens drawn
        "logprob": sequence_logprob,
        "mean_logprob": mean_logprob,
        "neg_perplexity": neg_perplexity,
        "min_token": min_token_logprob,
        # of the distributions before them
        "self_certainty": mean_self_certainty,
        "neg_entropy": neg_entropy,
        "confidence": confidence,
        "confidence_lowest": confidence_lowest,
        "confidence_bottom": confidence_bottom,
        "confidence_tail": confidence_tail,
        # of the answers
        "majority": majority,
        "rpc": perplexity_consistency,
    }
)


def stats_needed(name: str) -> tuple[str, ...]:
    """The token statistics that a reward is made of: what to pass as `stats=`."""
    positional = (p.name for p in _parameters(name) if p.kind is p.POSITIONAL_OR_KEYWORD)
    return tuple(parameter for parameter in positional if parameter not in LAYOUT)


def options_needed(name: str) -> tuple[str, ...]:
    """The options that a reward cannot do without, such as `answers`."""
    return tuple(option for option, is_needed in _options(name).items() if is_needed)


def missing_inputs(
    name: str, *, options: Collection[str] = (), stats: Collection[str] | None = None
) -> tuple[str, ...]:
    """What a reward needs and is not there: token statistics and options, by name.

    Args:
        name: Of a reward.
        options: The options that can be given: "answers", "keys".
        stats: The token statistics that can be computed; None for all of them.

    Raises:
        InputError: If there is no such reward.

    Example:
        >>> missing_inputs("rpc", options=["keys"]), missing_inputs("logprob")
        (('answers',), ())
    """
    lacking = [x for x in stats_needed(name) if stats is not None and x not in stats]
    return (*lacking, *(x for x in options_needed(name) if x not in options))


def check_reward(
    name: str,
    why: str,
    *,
    options: Collection[str] = (),
    stats: Collection[str] | None = None,
    argument: str = "reward",
) -> None:
    """Reject a reward that is unknown, or cannot be computed from what there is.

    Args:
        name: Of a reward.
        why: Ends the message about what is missing: who could give it, and what to do instead.
        options: As in `missing_inputs`.
        stats: As in `missing_inputs`.
        argument: What the caller calls the reward.

    Raises:
        InputError: Says what the reward needs.

    Example:
        >>> check_reward("rpc", "which only a task can extract", options=["keys"])
        Traceback (most recent call last):
            ...
        sharpen.errors.InputError: `reward` rpc needs answers, which only a task can extract.
        >>> check_reward("rpc", "unused", options=["answers", "keys"])
    """
    _reward(name, argument)
    lacking = missing_inputs(name, options=options, stats=stats)
    if lacking:
        raise InputError(f"`{argument}` {name} needs {', '.join(lacking)}, {why}.")


# an option is whatever its reward says it is
def compute(
    name: str, columns: Mapping[str, Tensor | None], options: Mapping[str, Any]
) -> Float32[Tensor, " N"]:
    """The reward `name` from the token statistics and layout in `columns`."""
    function = _reward(name)
    missing = [stat for stat in stats_needed(name) if columns.get(stat) is None]
    if missing:
        raise InputError(
            f"reward {name!r} needs the token statistic {', '.join(missing)}, which was not "
            f"computed; score with stats={stats_needed(name)!r}."
        )
    required, allowed = set(options_needed(name)), set(_options(name))
    if not required <= options.keys() <= allowed:
        optional = f" and may get {_listed(allowed - required)}" if allowed > required else ""
        raise InputError(
            f"reward {name!r} must get the options {_listed(required)}{optional}, "
            f"got {_listed(options)}."
        )
    given = {p.name: columns[p.name] for p in _parameters(name) if p.name not in allowed}
    return function(**given, **options)


def _reward(name: str, argument: str = "reward") -> Callable[..., Tensor]:
    if name not in REWARDS:
        raise InputError(f"`{argument}` must be one of {', '.join(REWARDS)}, got {name!r}.")
    return REWARDS[name]


def _parameters(name: str) -> list[inspect.Parameter]:
    return list(inspect.signature(_reward(name)).parameters.values())


def _options(name: str) -> dict[str, bool]:
    """Whether each option of the reward must be given."""
    options = (p for p in _parameters(name) if p.kind is p.KEYWORD_ONLY)
    return {p.name: p.default is p.empty for p in options}


def _listed(names: Mapping[str, Any] | set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "none"
