"""Which trainings a study compares, and the samples that each takes."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .study_plan import Sizes

TEST, TRAIN = "test", "sharpen+free"
ALPHA = 4.0
# samples of a prompt in a later round of SFT
ROUND_N = 10
# a round that fits what greedy decoding finds: one completion, nothing to rate
GREEDY = {"lr": 5e-5, "temperature": 0.0, "scores": "sampler"}


@dataclass(frozen=True)
class Method:
    """One training.

    Attributes:
        verb: The command.
        flags: What differs from its defaults.
        samples: "pool" of the training prompts, "test" of the test prompts, its "own", or its
            own "greedy" completions.
        is_equal: Whether it is compared at equal samples, those of `Sizes.equal_*`.
        after: The method whose model it starts from; None for the base.
    """

    verb: str
    flags: dict[str, Any] = field(default_factory=dict)
    samples: Literal["pool", "test", "own", "greedy"] = "pool"
    is_equal: bool = True
    after: str | None = None


# Learning rates: that of the command for `sft` and half of it in its later rounds; that of `rlhf`
# chosen by accuracy on other targets, that of `xpo` by J_beta; none on test prompts
METHODS = {
    "sft": Method("sft", is_equal=False),
    "sft-round2": Method("sft", {"lr": 5e-5}, samples="own", is_equal=False, after="sft"),
    "sft-round3": Method("sft", {"lr": 5e-5}, samples="own", is_equal=False, after="sft-round2"),
    "sft-greedy": Method("sft", GREEDY, samples="greedy", is_equal=False, after="sft"),
    "sft-greedy2": Method("sft", GREEDY, samples="greedy", is_equal=False, after="sft-greedy"),
    "sft-transductive": Method("sft", {"epochs": 10.0}, samples="test", is_equal=False),
    "sft-equal": Method("sft"),
    "soft-sft": Method("sft", {"weights": "soft", "soft_temperature": 1 / (ALPHA - 1)}),
    "rlhf": Method("rlhf", {"beta": 1 / (ALPHA - 1), "lr": 3e-5}),
    "dpo": Method("rlhf", {"loss": "dpo", "pairs": "best_worst", "beta": 0.1, "lr": 1e-5}),
    "xpo": Method("xpo", {"beta": 1 / (ALPHA - 1), "lr": 1e-5}, samples="own"),
}


@dataclass(frozen=True)
class Given:
    """The samples that a training takes: the first n of each of the first `limit` prompts."""

    split: str
    limit: int | None
    n: int


def given(sizes: "Sizes", method: str) -> Given:
    """What a method takes, or draws in one go."""
    kind = METHODS[method]
    if kind.samples == "test":
        return Given(TEST, sizes.limit, min(sizes.train_n, sizes.n))
    if kind.samples == "greedy":
        return Given(TRAIN, sizes.train_limit, 1)
    if kind.after is not None:
        return Given(TRAIN, sizes.equal_limit, min(ROUND_N, sizes.train_n))
    if kind.is_equal:
        return Given(TRAIN, sizes.equal_limit, sizes.equal_n)
    return Given(TRAIN, sizes.train_limit, sizes.train_n)


def pool_name(method: str, seed: int) -> str | None:
    """The stage whose samples a training takes; None where it draws its own."""
    return {"pool": "train/pool", "test": f"base/pool-{seed}"}.get(METHODS[method].samples)


def lineage(method: str) -> list[str]:
    """A method and those before it, the first one first.

    Example:
        >>> lineage("sft-round3")
        ['sft', 'sft-round2', 'sft-round3']
    """
    before = METHODS[method].after
    return [*([] if before is None else lineage(before)), method]
