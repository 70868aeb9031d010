"""What a run measured: P prompts, G completions each, their rewards and their grades.

P prompts, G completions per prompt.  Log-probabilities are nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from sharpen.errors import InputError

MAJORITY, RPC = "majority", "rpc"
VOTES = (MAJORITY, RPC)  # rewards of a completion that change with the completions beside it


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
        _check("valid_PG", self.valid_PG, np.dtype(bool), P=P, G=G)
        for name, reward_PG in self.reward_PG.items():
            _check(f"reward_PG[{name!r}]", reward_PG, np.dtype(np.float64), P=P, G=G)
        if "logprob" not in self.reward_PG:
            raise InputError(
                f"`reward_PG` must hold 'logprob', got {sorted(self.reward_PG)}; "
                "score the samples first."
            )
        if self.correct_PG is not None:
            _check("correct_PG", self.correct_PG, np.dtype(bool), P=P, G=G)
        if self.greedy_correct_P is not None:
            _check("greedy_correct_P", self.greedy_correct_P, np.dtype(bool), P=P)
            if self.correct_PG is None:
                raise InputError(
                    "`greedy_correct_P` needs `correct_PG` beside it, got None; grade the samples."
                )
        if self.answers is not None:
            _check_nested("answers", self.answers, P, G)
        if self.response_PG is not None:
            _check("response_PG", self.response_PG, np.dtype(np.int64), P=P, G=G)
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


def _check(name: str, value: np.ndarray, dtype: np.dtype, **dims: int) -> None:
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
