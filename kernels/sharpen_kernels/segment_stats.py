"""What can be asked about runs of tokens, and about groups of runs.

S scored tokens, N sequences, P groups of sequences.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from jaxtyping import Float32, Int64
from torch import Tensor

SequenceStatistic = Literal[
    "sum", "mean", "min", "count", "all", "lowest_window", "bottom_windows", "tail_window"
]
GroupStatistic = Literal["argmax", "max", "mean", "std", "log_mean_exp", "advantage", "weights"]
SEQUENCE_NAMES: tuple[SequenceStatistic, ...] = get_args(SequenceStatistic)
GROUP_NAMES: tuple[GroupStatistic, ...] = get_args(GroupStatistic)


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceStats:
    """One value per sequence for each statistic that was asked for, `None` for the others.

    Of the L values x of one sequence, and of its L - w + 1 windows of w neighbouring values:

        sum             sum x; 0 where L = 0
        mean            sum x / L; 0 where L = 0
        min             the least x; inf where L = 0
        count           L, int64
        all             1.0 where no x is 0, else 0.0; 1.0 where L = 0
        lowest_window   the least mean of a window
        bottom_windows  the mean of the lowest tenth of the windows' means, rounded down, at least 1
        tail_window     the mean of the last window

    w is what `window` says, at least 1 and at most L; the windows of an empty sequence give 0.
    A NaN makes NaN of every value of its sequence but `count`. fp32; fp64 where the values are.

    Source:
        Windows: Fu et al. 2025 (DeepConf), arXiv:2508.15260.
    """

    sum: Float32[Tensor, " N"] | None = None
    mean: Float32[Tensor, " N"] | None = None
    min: Float32[Tensor, " N"] | None = None
    count: Int64[Tensor, " N"] | None = None
    all: Float32[Tensor, " N"] | None = None
    lowest_window: Float32[Tensor, " N"] | None = None
    bottom_windows: Float32[Tensor, " N"] | None = None
    tail_window: Float32[Tensor, " N"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class GroupStats:
    """One value per group, or per sequence, for each statistic that was asked for, else `None`.

    Of the G scores x of a group's eligible sequences: those that are `valid` and not empty.

        argmax        where in its group the highest x is, the first of a tie; [P] int64; -1 where
                      there is none. NaN is never chosen
        max           its x, [P]; NaN where there is none
        mean          sum x / G, [P]
        std           sqrt(sum (x - mean)^2 / (G - 1)), [P]; 0 where G = 1
        log_mean_exp  T log(sum exp(x / T) / G), [P]
        advantage     (x - mean) / (std + 1e-4), [N]
        weights       exp(x / T) / sum exp(x / T) over the group, [N]

    T is `temperature`. mean, std and log_mean_exp of no score are NaN; so are they, and the group's
    advantages and weights, where a score is NaN. Sequences that are not eligible, or in no group,
    have advantage and weight 0. fp32; fp64 where the scores are.

    Source:
        Advantage: Shao et al. 2024 (GRPO), arXiv:2402.03300, with the 1e-4 of TRL.
    """

    argmax: Int64[Tensor, " P"] | None = None
    max: Float32[Tensor, " P"] | None = None
    mean: Float32[Tensor, " P"] | None = None
    std: Float32[Tensor, " P"] | None = None
    log_mean_exp: Float32[Tensor, " P"] | None = None
    advantage: Float32[Tensor, " N"] | None = None
    weights: Float32[Tensor, " N"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
    """The reductions of each token statistic, by its name: to sequences, and to groups of them."""

    sequences: Mapping[str, SequenceStats]
    groups: Mapping[str, GroupStats]
