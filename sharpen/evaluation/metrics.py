"""What a run measured, its figures over the prompts, and how far other prompts would move them.

Run           `Outcome`: rewards and grades of all completions; `Texts`: what was said.
Uncertainty   `resample_means`, `ci95`, `p_value`, `bootstrap_ci95`: a percentile bootstrap. The
              prompt is the unit of resampling; all samples of a prompt move together. One set of
              resamples serves every statistic of a run, so any two of them are paired.
Best of k     `best_of_k`, `pass_at_k`, `sample_accuracy`: expectations over random subsets of k of
              the G samples that a run drew once.
Subset votes  `vote_weights`, `all_votes`: what a vote chooses, which changes with the subset.
AUROC         `within_prompt_auroc`: whether a reward tells right from wrong within a prompt.

Best of k needs no Monte Carlo for a reward that is a number of its completion. Sort the eligible
completions best first: the one at rank j is chosen if it is in the subset and the j before it are
not,

    weight[j] = C(G - 1 - j, k - 1) / C(G, k) = k/G * prod_{i<j} (G - k - i) / (G - 1 - i)

and every figure is a sum of weight x value. At k = G the weights are one-hot: the choice of
`best_of_n`. A vote is not an order statistic, so `majority` and `rpc` enumerate all subsets where
they are few and draw seeded ones where they are many.

P prompts, G completions per prompt, M statistics, B resamples or subsets, A answers.
"""

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sharpen.errors import InputError

MAJORITY, RPC = "majority", "rpc"
VOTES = (MAJORITY, RPC)  # rewards of a completion that change with the completions beside it
N_RESAMPLES = 10_000  # a choice: the Monte Carlo error of a 95 % limit is far below its width
CHUNK = 1 << 22  # prompt draws held at once, 32 MiB
N_SUBSETS = 200  # of a vote, per prompt: standard error at most 0.035 / sqrt(P); a choice
NO_VOTE = -sys.float_info.max  # below every value of an answer, above no choice at all


@dataclass(frozen=True)
class Outcome:
    """Rewards and grades of P x G completions, checked once, on construction.

    Attributes:
        reward_PG: One float64 [P, G] array per reward, "logprob" (nats, whole sequence) always
            among them; higher is better, NaN where a reward is not defined.
        valid_PG: bool [P, G]; False for a completion that must never be chosen: cut at the token
            limit, empty, or with a log-probability that is NaN.
        correct_PG: bool [P, G]; grades, those of invalid completions included; None for prompts
            without a checker.
        greedy_correct_P: bool [P]; grades of greedy decoding; None if it was not run.
        answers: [P][G]; the answer that each completion gives, None where none could be read; None
            as a whole where no extractor exists. With it, "majority" is one of `rewards`.
        response_PG: int64 [P, G]; of a prompt's completions, those of equal number are equal; None
            if it is not known. The reward "rpc" counts equal ones once.

    Raises:
        InputError: If a shape or dtype disagrees, or "logprob" is missing, or "majority" or "rpc"
            comes without `answers`, or "rpc" without `response_PG`.
    """

    # plain annotations: shapes and dtypes are checked below, with a message that says the fix
    reward_PG: dict[str, np.ndarray]
    valid_PG: np.ndarray
    correct_PG: np.ndarray | None = None
    greedy_correct_P: np.ndarray | None = None
    answers: Sequence[Sequence[str | None]] | None = None
    response_PG: np.ndarray | None = None

    def __post_init__(self) -> None:
        if np.ndim(self.valid_PG) != 2 or 0 in np.shape(self.valid_PG):
            raise InputError(
                "`valid_PG` must have shape (P, G) with P, G >= 1, "
                f"got {np.shape(self.valid_PG)}; evaluate a run with at least one sample."
            )
        P, G = self.valid_PG.shape
        _check_array("valid_PG", self.valid_PG, np.dtype(bool), P=P, G=G)
        for name, reward_PG in self.reward_PG.items():
            _check_array(f"reward_PG[{name!r}]", reward_PG, np.dtype(np.float64), P=P, G=G)
        if "logprob" not in self.reward_PG:
            raise InputError(
                f"`reward_PG` must hold 'logprob', got {sorted(self.reward_PG)}; "
                "score the samples first."
            )
        if self.correct_PG is not None:
            _check_array("correct_PG", self.correct_PG, np.dtype(bool), P=P, G=G)
        if self.greedy_correct_P is not None:
            _check_array("greedy_correct_P", self.greedy_correct_P, np.dtype(bool), P=P)
            if self.correct_PG is None:
                raise InputError(
                    "`greedy_correct_P` needs `correct_PG` beside it, got None; grade the samples."
                )
        if self.answers is not None:
            _check_nested("answers", self.answers, P, G)
        if self.response_PG is not None:
            _check_array("response_PG", self.response_PG, np.dtype(np.int64), P=P, G=G)
        for name in set(VOTES) & set(self.reward_PG):
            if self.answers is None:
                raise InputError(
                    f"`answers` must be given with the reward {name!r}, got None; "
                    "pass the extracted answers, because the vote changes with the subset."
                )
        if RPC in self.reward_PG and self.response_PG is None:
            raise InputError(
                "`response_PG` must be given with the reward 'rpc', got None; "
                "number the distinct completions of each prompt."
            )

    @property
    def n_prompts(self) -> int:
        """P."""
        return self.valid_PG.shape[0]

    @property
    def n_samples(self) -> int:
        """G, completions per prompt."""
        return self.valid_PG.shape[1]

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names that a completion can be chosen by; "majority" last, if `answers` are known."""
        voted = (MAJORITY,) if self.answers is not None else ()
        return (*(name for name in self.reward_PG if name != MAJORITY), *voted)

    def eligible(self, reward: str) -> Bool[np.ndarray, "P G"]:
        """Whether each completion may be chosen by `reward`: valid, and the reward defined.

        A completion without an answer may win a vote, with no vote, where all are without one.

        Raises:
            InputError: If `reward` is not one of `rewards`.
        """
        if reward not in self.rewards:
            known = ", ".join(self.rewards)
            raise InputError(f"`reward` must be one of {known}, got {reward!r}; score with it.")
        may_PG = self.valid_PG
        if reward in self.reward_PG:
            may_PG = may_PG & ~np.isnan(self.reward_PG[reward])
        return may_PG


@dataclass(frozen=True)
class Texts:
    """What the report quotes: P prompts, and the G completions of each.

    Raises:
        InputError: If the completions are not one list per prompt.
    """

    prompts: list[str]
    completions: list[list[str]]

    def __post_init__(self) -> None:
        P, n_lists = len(self.prompts), len(self.completions)
        if n_lists != P:
            raise InputError(
                f"`completions` must hold one list per prompt, {P} lists, got {n_lists}; "
                "pass prompts and completions of the same run."
            )

    def check(self, outcome: Outcome) -> None:
        """Raise `InputError` unless there is one text per completion of `outcome`."""
        _check_nested("completions", self.completions, outcome.n_prompts, outcome.n_samples)


def _check_array(name: str, value: np.ndarray, dtype: np.dtype, **dims: int) -> None:
    got_shape, got_dtype = np.shape(value), getattr(value, "dtype", type(value).__name__)
    if got_shape != tuple(dims.values()) or got_dtype != dtype:
        axes = ", ".join(f"{axis}={size}" for axis, size in dims.items())
        raise InputError(
            f"`{name}` must be {dtype} of shape ({axes}), got {got_dtype} of shape {got_shape}; "
            "build every array over the same prompts and samples."
        )


def _check_nested(name: str, rows: Sequence[Sequence[object]], P: int, G: int) -> None:
    if len(rows) != P:
        raise InputError(f"`{name}` must hold P={P} lists, got {len(rows)}; one per prompt.")
    for p, row in enumerate(rows):
        if len(row) != G:
            raise InputError(
                f"`{name}[{p}]` must hold G={G} entries, got {len(row)}; one per completion."
            )


def resample_means(
    value_PM: Float64[np.ndarray, "P M"], *, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> Float64[np.ndarray, "B M"]:
    """Mean of every column over P prompts drawn with replacement, `n_resamples` times."""
    P = len(value_PM)
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // P)
    means = []
    for start in range(0, n_resamples, rows):
        size = min(rows, n_resamples - start)
        draw_BP = rng.integers(P, size=(size, P)) + P * np.arange(size)[:, None]
        count_BP = np.bincount(draw_BP.ravel(), minlength=size * P).reshape(size, P)
        means.append(count_BP.astype(np.float64) @ value_PM / P)
    return np.concatenate(means)


def ci95(statistic_B: Float64[np.ndarray, " B"]) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of a resampled statistic."""
    low, high = np.percentile(statistic_B, [2.5, 97.5])
    return float(low), float(high)


def p_value(difference_B: Float64[np.ndarray, " B"]) -> float:
    """Two-sided p-value of "the difference is zero", from its resampled values.

        p = min(1, 2 * (1 + min(#{d <= 0}, #{d >= 0})) / (B + 1))

    It is the percentile interval turned round: p < 0.05 where the 95 % interval leaves out 0.
    Never 0; the smallest possible is 2 / (B + 1).

    Source:
        Efron and Tibshirani 1993, chapters 13 and 15; the added one is Davison and Hinkley 1997.
    """
    # equal vectors summed in another order differ in the last bits; that is not a sign
    d = np.round(difference_B, 12)
    tail = min(int((d <= 0).sum()), int((d >= 0).sum()))
    return min(1.0, 2 * (1 + tail) / (len(d) + 1))


def bootstrap_ci95(
    value_P: Float64[np.ndarray, " P"], *, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `value_P` over prompts."""
    return ci95(resample_means(value_P[:, None], seed=seed, n_resamples=n_resamples)[:, 0])


@dataclass(frozen=True)
class BestOfK:
    """Best-of-k of one reward at one k, prompt by prompt, so that prompts can be resampled.

    Attributes:
        weight_PG: Probability that each completion is the chosen one; a row sums to the share
            of subsets that hold an eligible completion.
        accuracy_P: Probability of a correct choice; a subset without an eligible completion
            counts as wrong. None without a checker.
        mean_logprob: Mean log-probability of the chosen, nats, over all prompts and subsets
            that have a choice (pooled, each with its probability); NaN if none has.
    """

    weight_PG: Float64[np.ndarray, "P G"]
    accuracy_P: Float64[np.ndarray, " P"] | None
    mean_logprob: float


def best_of_k(
    outcome: Outcome, reward: str, k: int, *, seed: int = 0, n_subsets: int = N_SUBSETS
) -> BestOfK:
    """Expected accuracy and log-probability of the best of k random samples by `reward`.

    Exact for every reward but the votes "majority" and "rpc", which are exact where
    C(G, k) <= max(n_subsets, G) (so at k = 1 and k = G) and otherwise a mean over `n_subsets`
    random subsets per prompt.

    Args:
        outcome: The run.
        reward: One of `outcome.rewards`.
        k: Subset size, 1 <= k <= G.
        seed: Of the random subsets; not used by exact figures.
        n_subsets: Random subsets per prompt, >= 1.

    Raises:
        InputError: If `k` is out of range or the reward unknown.
    """
    _check_k(k, outcome.n_samples)
    if reward in VOTES:
        weight_PG = vote_weights(outcome, reward, k, seed, n_subsets)
    else:
        weight_PG = _rank_weights(outcome, reward, k)
    logprob_PG = outcome.reward_PG["logprob"]
    counted_PG = (weight_PG > 0) & ~np.isnan(logprob_PG)
    total = weight_PG[counted_PG].sum()
    mean = float(weight_PG[counted_PG] @ logprob_PG[counted_PG] / total) if total > 0 else math.nan
    accuracy_P = None
    if outcome.correct_PG is not None:
        accuracy_P = (weight_PG * outcome.correct_PG).sum(axis=1)
    return BestOfK(weight_PG, accuracy_P, mean)


def pass_at_k(correct_PG: Bool[np.ndarray, "P G"], k: int) -> Float64[np.ndarray, " P"]:
    """Probability that at least one of k random samples is correct, valid or not.

        1 - C(G - c, k) / C(G, k) = 1 - prod_{i<k} (G - c - i) / (G - i)

    Raises:
        InputError: If `k` is not in 1..G.

    Source:
        Chen et al. 2021, arXiv:2107.03374, equation 1.

    Example:
        >>> pass_at_k(np.array([[True, False, False, False]]), 2)
        array([0.5])
    """
    G = correct_PG.shape[1]
    _check_k(k, G)
    i_k = np.arange(k)
    wrong_P = G - correct_PG.sum(axis=1)
    # where k > G - c one factor is exactly 0
    return 1 - np.prod((wrong_P[:, None] - i_k) / (G - i_k), axis=1)


def sample_accuracy(correct_PG: Bool[np.ndarray, "P G"]) -> Float64[np.ndarray, " P"]:
    """Expected accuracy of one sample: the mean over all G, valid or not."""
    return correct_PG.mean(axis=1, dtype=np.float64)


def order_by(outcome: Outcome, reward: str) -> Int64[np.ndarray, "P G"]:
    """Completion indices best first: eligible before ineligible, ties by the lower index."""
    eligible_PG = outcome.eligible(reward)
    reward_PG = all_votes(outcome) if reward == MAJORITY else outcome.reward_PG[reward]
    # -inf is a legal reward, so eligibility is a key of its own and not a sentinel value
    key_PG = np.where(eligible_PG, -reward_PG, 0.0)
    return np.lexsort((key_PG, ~eligible_PG), axis=1).astype(np.int64)


def _check_k(k: int, G: int) -> None:
    if not 1 <= k <= G:
        raise InputError(f"`k` must be in 1..{G}, the samples per prompt, got {k}; sample more.")


def _rank_weights(outcome: Outcome, reward: str, k: int) -> Float64[np.ndarray, "P G"]:
    G = outcome.n_samples
    i = np.arange(G - 1)
    step = np.maximum(G - k - i, 0) / (G - 1 - i)
    weight_G = k / G * np.concatenate([[1.0], np.cumprod(step)])
    weight_PG = np.empty((outcome.n_prompts, G))
    np.put_along_axis(weight_PG, order_by(outcome, reward), weight_G[None], axis=1)
    return np.where(outcome.eligible(reward), weight_PG, 0.0)


def vote_weights(
    outcome: Outcome, reward: str, k: int, seed: int, n_subsets: int
) -> Float64[np.ndarray, "P G"]:
    """Share of the subsets of k that choose each completion, by the vote `reward`.

    In a subset the value of a completion is that of its answer: the number of completions that
    give it ("majority"), or the log of the summed probability of the distinct ones ("rpc"). The
    first completion of the highest value is the choice; one without an answer has the least value
    there is.

    All subsets where there are at most max(n_subsets, G), else `n_subsets` seeded ones per prompt.
    """
    G = outcome.n_samples
    eligible_PG = outcome.eligible(reward)
    weight_PG = np.zeros((outcome.n_prompts, G))
    is_exact = math.comb(G, k) <= max(n_subsets, G)
    member_BG = _all_subsets(G, k) if is_exact else None
    for p, label_G in enumerate(_labels(outcome, reward)):
        if member_BG is None:
            # a generator per prompt: its subsets do not depend on which prompts stand before it
            drawn_BG = np.random.default_rng([seed, p]).random((n_subsets, G)).argsort(axis=1) < k
        else:
            drawn_BG = member_BG
        able_BG = drawn_BG & eligible_PG[p]
        if reward == RPC:
            assert outcome.response_PG is not None
            logprob_G = outcome.reward_PG["logprob"][p]
            value_BG = _log_masses(label_G, outcome.response_PG[p], logprob_G, able_BG)
        else:
            value_BG = _counts(label_G, able_BG)
        value_BG = np.where(able_BG, np.maximum(value_BG, NO_VOTE), -np.inf)
        winner_B = value_BG.argmax(axis=1)[able_BG.any(axis=1)]
        weight_PG[p] = np.bincount(winner_B, minlength=G) / len(drawn_BG)
    return weight_PG


def all_votes(outcome: Outcome) -> Float64[np.ndarray, "P G"]:
    """Votes for each completion's answer among all eligible ones; 0 for one without an answer."""
    member_1G = np.ones((1, outcome.n_samples), dtype=bool)
    labels = _labels(outcome, MAJORITY)
    return np.concatenate([_counts(label_G, member_1G) for label_G in labels])


def _labels(outcome: Outcome, reward: str) -> Iterator[Int64[np.ndarray, " G"]]:
    """Answers of each prompt as small integers; -1 for a completion that has no vote."""
    eligible_PG = outcome.eligible(reward)
    for p, row in enumerate(outcome.answers or []):
        label_G = np.full(len(row), -1, dtype=np.int64)
        seen: dict[str | None, int] = {}
        for g in np.flatnonzero(eligible_PG[p]).tolist():
            if row[g] is not None:
                label_G[g] = seen.setdefault(row[g], len(seen))
        yield label_G


def _counts(
    label_G: Int64[np.ndarray, " G"], member_BG: Bool[np.ndarray, "B G"]
) -> Float64[np.ndarray, "B G"]:
    """Votes that each completion's answer gets in each subset; 0 for one without an answer."""
    # column 0 is for no answer and stays empty
    label_A = np.arange(-1, label_G.max() + 1)
    is_vote_GA = (label_G[:, None] == label_A) & (label_A >= 0)
    return (member_BG.astype(np.float64) @ is_vote_GA)[:, label_G + 1]


def _log_masses(
    label_G: Int64[np.ndarray, " G"],
    response_G: Int64[np.ndarray, " G"],
    logprob_G: Float64[np.ndarray, " G"],
    able_BG: Bool[np.ndarray, "B G"],
) -> Float64[np.ndarray, "B G"]:
    """Log-mass of each completion's answer in each subset, nats; -inf for one without an answer."""
    mass_BA = np.full((len(able_BG), label_G.max() + 2), -np.inf)
    # of an answer that no eligible completion gives there is no column; column 0 stays empty
    for label, response in sorted(set(zip(label_G.tolist(), response_G.tolist(), strict=True))):
        if label < 0:
            continue
        same_G = (label_G == label) & (response_G == response)
        logprob = logprob_G[same_G][0]
        is_there_B = able_BG[:, same_G].any(axis=1)
        mass_BA[is_there_B, label + 1] = np.logaddexp(mass_BA[is_there_B, label + 1], logprob)
    return mass_BA[:, label_G + 1]


def _all_subsets(G: int, k: int) -> Bool[np.ndarray, "B G"]:
    index_BK = np.array(list(itertools.combinations(range(G), k)))
    member_BG = np.zeros((len(index_BK), G), dtype=bool)
    np.put_along_axis(member_BG, index_BK, True, axis=1)
    return member_BG


@dataclass(frozen=True)
class Auroc:
    """Areas under the ROC curve of one reward.

    Attributes:
        mean: Mean of the prompts' areas, each prompt alike; NaN where none has one.
        pooled: Share of all pairs of all prompts that are in order, each pair alike.
        n_prompts: Prompts that have an area: with a right and a wrong completion.
        auroc_P: Area of each prompt, NaN where it has none.
        n_pairs_P: Pairs of a right and a wrong completion of each prompt.
    """

    mean: float
    pooled: float
    n_prompts: int
    auroc_P: Float64[np.ndarray, " P"]
    n_pairs_P: Int64[np.ndarray, " P"]


def within_prompt_auroc(
    reward_PG: Float64[np.ndarray, "P G"],
    # their shapes are checked below, with a message
    correct_PG: Bool[np.ndarray, "..."],
    valid_PG: Bool[np.ndarray, "..."] | None = None,
) -> Auroc:
    """Chance that a right completion of a prompt has a higher reward than a wrong one.

    A choice is made within a prompt, so only the order within it counts: a reward can separate
    easy prompts from hard ones, and look good over all completions together, without helping any
    choice.

        auroc[p] = mean over right i, wrong j of p of  1[r_i > r_j] + 1[r_i = r_j] / 2

    0.5 is a coin, 1 always right. Prompts whose completions are all right, or all wrong, have no
    pair and are left out, and so are completions that are not valid or whose reward is NaN: a
    choice never sees them.

    Args:
        reward_PG: Higher is better; infinities are ordered as they are.
        correct_PG: Grades.
        valid_PG: Which completions may be chosen; default: all.

    Raises:
        InputError: If the arrays are of different shapes.

    Source:
        Taubenfeld et al. 2025 (CISC), arXiv:2502.06233, within-question discrimination: `pooled`.

    Example:
        >>> reward_PG = np.array([[3.0, 2.0, 1.0], [1.0, 1.0, 5.0]])
        >>> correct_PG = np.array([[True, False, True], [True, True, True]])
        >>> found = within_prompt_auroc(reward_PG, correct_PG)
        >>> found.mean, found.n_prompts  # 3 > 2, 1 < 2; the second prompt has nothing wrong
        (0.5, 1)
    """
    for name, given_PG in (("correct_PG", correct_PG), ("valid_PG", valid_PG)):
        if given_PG is not None and given_PG.shape != reward_PG.shape:
            raise InputError(
                f"`{name}` must be of the shape of `reward_PG`, {reward_PG.shape}, "
                f"got {given_PG.shape}."
            )
    may_PG = ~np.isnan(reward_PG)
    if valid_PG is not None:
        may_PG = may_PG & valid_PG
    P = len(reward_PG)
    won_P, n_pairs_P = np.zeros(P), np.zeros(P, dtype=np.int64)
    for p in range(P):
        right, wrong = (reward_PG[p, may_PG[p] & c] for c in (correct_PG[p], ~correct_PG[p]))
        wrong = np.sort(wrong)
        # wrong ones below each right one, and below or beside it
        below, beside = (np.searchsorted(wrong, right, side) for side in ("left", "right"))
        won_P[p] = (below.sum() + beside.sum()) / 2
        n_pairs_P[p] = len(right) * len(wrong)
    auroc_P = np.full(P, np.nan)
    np.divide(won_P, n_pairs_P, out=auroc_P, where=n_pairs_P > 0)
    has_area = n_pairs_P > 0
    n_prompts, n_pairs = int(has_area.sum()), int(n_pairs_P.sum())
    return Auroc(
        mean=float(auroc_P[has_area].mean()) if n_prompts else float("nan"),
        pooled=float(won_P.sum() / n_pairs) if n_pairs else float("nan"),
        n_prompts=n_prompts,
        auroc_P=auroc_P,
        n_pairs_P=n_pairs_P,
    )
