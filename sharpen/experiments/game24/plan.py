"""Which runs a study is made of, in what order, and how large they are.

Each run is one of the other commands:

train/pool samples of the training prompts, for all objectives that take given ones
base       a pool of N samples of each test prompt for every seed, scored; greedy; low temperature
power      Metropolis-Hastings and particles, at the token cost of best-of-N
train      every objective, for every seed
judge      of each trained model: N samples and greedy, scored by the base model

`METHODS` are the trainings that are compared, `Sizes` how much is drawn, `plan` the runs.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sharpen.commands.rlhf import RlhfConfig
from sharpen.commands.sample import SampleConfig
from sharpen.commands.score import ScoreConfig
from sharpen.commands.sft import SftConfig
from sharpen.commands.xpo import XpoConfig
from sharpen.errors import check_value
from sharpen.experiments.options import StudyConfig

from .selectors import REWARDS
from .stages import Stage

TEST, TRAIN = "test", "sharpen+free"
TEMPERATURES = (0.5, 0.25)
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
class Sizes:
    """How large a study is.

    Attributes:
        seeds: Runs of everything that is random, but training.
        train_seeds: Runs of each training, judged by samples of the same seed.
        limit: Test prompts; None for all.
        n: Samples of each to choose from.
        few: Samples of low temperature, and chains, of each.
        budgets: Plain samples that a sample of a power sampler may cost; each at most n.
        train_limit: Training prompts; None for all.
        train_n: Samples of each.
        equal_limit: Of these prompts, those that the objectives are compared on; None for all.
        equal_n: Samples of each, in every objective; a multiple of 4.
        rounds: Of XPO.
        validation: Prompts that XPO chooses its round by.
        save_every: Steps between checkpoints.
    """

    seeds: int
    train_seeds: int
    limit: int | None
    n: int
    few: int
    budgets: tuple[int, ...]
    train_limit: int | None
    train_n: int
    equal_limit: int | None
    equal_n: int
    rounds: int
    validation: int
    save_every: int

    def grid(self) -> list[int]:
        """N at which selectors are compared."""
        return sorted({*(k for k in (5, 10, 25, 50) if k <= self.n), self.n})


FULL = Sizes(
    seeds=3,
    train_seeds=3,
    limit=None,
    n=50,
    few=8,
    budgets=(10, 25),
    train_limit=None,
    train_n=25,
    equal_limit=3250,
    equal_n=8,
    rounds=2,
    validation=32,
    save_every=500,
)
QUICK = Sizes(
    seeds=1,
    train_seeds=1,
    limit=24,
    n=10,
    few=2,
    budgets=(5,),
    train_limit=24,
    train_n=4,
    equal_limit=24,
    equal_n=4,
    rounds=1,
    validation=4,
    save_every=500,
)


def sizes_of(config: StudyConfig) -> Sizes:
    """The sizes that the flags ask for."""
    base = QUICK if config.quick else FULL
    names = ("seeds", "train_seeds", "limit", "n", "few", "train_limit", "train_n")
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    sizes = replace(base, **given)
    least = {"seeds": 1, "train_seeds": 1, "limit": 1, "n": 2, "few": 1, "train_n": 2}
    for name, at_least in least.items():
        if name in given:
            check_value(name, given[name], given[name] >= at_least, f"at least {at_least}")
    limits = [x for x in (sizes.equal_limit, sizes.train_limit) if x is not None]
    check_value(
        "train_limit",
        sizes.train_limit,
        sizes.train_limit is None or sizes.train_limit > sizes.validation,
        f"above {sizes.validation}, the prompts that XPO chooses its round by",
    )
    return replace(
        sizes,
        budgets=tuple(k for k in sizes.budgets if k <= sizes.n) or (sizes.n,),
        equal_limit=min(limits, default=None),
        equal_n=min(sizes.equal_n, sizes.train_n),
    )


def plan(config: StudyConfig, sizes: Sizes) -> list[Stage]:
    """The runs, in order."""
    runs = _StageMaker(config, sizes)
    stages = [
        runs.sample("train/pool", n=sizes.train_n, split=TRAIN, limit=sizes.train_limit),
        runs.sample("base/greedy", n=1, temperature=0.0),
    ]
    for seed in range(sizes.seeds):
        stages += [
            runs.sample(f"base/pool-{seed}", n=sizes.n, seed=seed),
            runs.score(f"base/pool-{seed}", list(REWARDS)),
        ]
        for t in TEMPERATURES:
            name = f"base/T{t:g}-{seed}"
            stages += [
                runs.sample(name, n=sizes.few, temperature=t, seed=seed),
                runs.score(name, ["logprob"], temperature=t),
            ]
        for budget in sizes.budgets:
            stages += [
                runs.sample(
                    f"power/mh{budget}-{seed}",
                    n=max(1, sizes.few // 4),
                    seed=seed,
                    sampler="mh",
                    alpha=ALPHA,
                    # a first sample, then moves that draw half of one: docs/algorithms/power.md
                    steps=max(1, 2 * (budget - 1)),
                ),
                runs.sample(
                    f"power/smc{budget}-{seed}",
                    n=budget,
                    seed=seed,
                    sampler="smc",
                    alpha=ALPHA,
                    particles=budget,
                ),
            ]
    for seed in range(sizes.train_seeds):
        for method in METHODS:
            name = f"{method}-{seed}"
            trained = runs.train(method, seed)
            stages += [
                trained,
                runs.sample(f"judge/{name}", of=trained.name, n=sizes.n, seed=seed),
                runs.score(f"judge/{name}", ["logprob"]),
                runs.sample(f"judge/{name}-greedy", of=trained.name, n=1, temperature=0.0),
                runs.score(f"judge/{name}-greedy", ["logprob"]),
            ]
    return stages


@dataclass(frozen=True)
class TakenSamples:
    """The samples that a training takes: the first n of each of the first `limit` prompts."""

    split: str
    limit: int | None
    n: int


def taken_samples(sizes: Sizes, method: str) -> TakenSamples:
    """What a method takes, or draws in one go."""
    kind = METHODS[method]
    if kind.samples == "test":
        return TakenSamples(TEST, sizes.limit, min(sizes.train_n, sizes.n))
    if kind.samples == "greedy":
        return TakenSamples(TRAIN, sizes.train_limit, 1)
    if kind.after is not None:
        return TakenSamples(TRAIN, sizes.equal_limit, min(ROUND_N, sizes.train_n))
    if kind.is_equal:
        return TakenSamples(TRAIN, sizes.equal_limit, sizes.equal_n)
    return TakenSamples(TRAIN, sizes.train_limit, sizes.train_n)


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


def samples_file(out: Path, name: str, *, scored: bool = False) -> Path:
    """Where the samples of a stage are."""
    return out / f"{name}{'.scored' if scored else ''}.jsonl"


class _StageMaker:
    """Makes stages of the flags that all runs of a study share."""

    def __init__(self, config: StudyConfig, sizes: Sizes):
        self.config, self.sizes, self.out = config, sizes, Path(config.out)
        names = ("model", "device", "dtype", "max_tokens", "trust_remote_code", "allow_pickle")
        self.common: dict[str, Any] = {name: getattr(config, name) for name in names}
        self.prompts: dict[str, Any] = {
            "task": config.task,
            "split": TEST,
            "limit": sizes.limit,
            "max_new_tokens": config.max_new_tokens,
        }

    # flags of the commands, by name
    def sample(self, name: str, *, of: str | None = None, **flags: Any) -> Stage:
        merged: dict[str, Any] = self.common | self.prompts | flags
        merged["out"] = str(samples_file(self.out, name))
        if of is not None:
            merged["model"] = self.model(of)
        return Stage(name, "sample", SampleConfig(**merged), () if of is None else (of,))

    def score(self, name: str, rewards: list[str], **flags: Any) -> Stage:
        config = ScoreConfig(
            **self.common,
            input=str(samples_file(self.out, name)),
            out=str(samples_file(self.out, name, scored=True)),
            rewards=rewards,
            **flags,
        )
        return Stage(f"{name}/scored", "score", config, (name,))

    def train(self, method: str, seed: int) -> Stage:
        kind, taken = METHODS[method], taken_samples(self.sizes, method)
        name, needs = f"train/{method}-{seed}", []
        flags = self.common | self.prompts | vars(taken)
        flags |= {"out": str(self.out / name), "seed": seed, "save_every": self.sizes.save_every}
        if kind.after is not None:
            needs.append(f"train/{kind.after}-{seed}")
            flags["model"] = self.model(needs[-1])
        if kind.verb == "xpo":
            # a round draws n of the base and n of the policy
            flags["n"] = max(1, taken.n // (2 * self.sizes.rounds))
            flags |= {"rounds": self.sizes.rounds, "validation": self.sizes.validation}
        pool = pool_name(method, seed)
        if pool is not None:
            needs.append(pool)
            flags |= {"samples": str(samples_file(self.out, pool)), "scores": "sampler"}
        config: Any = {"sft": SftConfig, "rlhf": RlhfConfig, "xpo": XpoConfig}[kind.verb]
        return Stage(name, kind.verb, config(**flags | kind.flags), tuple(needs))

    def model(self, stage: str) -> str:
        return str(self.out / stage / "model")
