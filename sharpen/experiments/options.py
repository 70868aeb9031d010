"""The options of the experiments' verbs; like those of the commands, they need no PyTorch."""

from dataclasses import dataclass, field

from sharpen.commands.options import ModelOptions, PromptOptions, option, required

# what `sharpen study` knows
TASKS = ("game24",)


@dataclass(frozen=True, kw_only=True)
class StudyConfig(ModelOptions):
    """Compare everything on one task."""

    task: str = required(f"what to study: {', '.join(TASKS)}")
    out: str = required("run directory; the same command again goes on where it stopped")
    model: str = option("the base: game24 (ships with sharpen), or a model folder", "game24")
    quick: bool = option("the same study in small: a few minutes, and no figure to rely on", False)
    seeds: int | None = option("runs of everything that is random; 3, quick 1")
    train_seeds: int | None = option("runs of each training; 3, quick 1")
    limit: int | None = option("only the first LIMIT test prompts; quick 24")
    n: int | None = option("samples of a test prompt to choose from; 50, quick 10", None, ("-n",))
    few: int | None = option("samples of low temperature, and chains; 8, quick 2")
    train_limit: int | None = option("only the first TRAIN_LIMIT training prompts; quick 24")
    train_n: int | None = option("samples of a training prompt; 25, quick 4")
    max_new_tokens: int = option("cut completions here; a cut one is never chosen", 48)
    jobs: int = option("stages side by side, each in a process with its share of the threads", 1)


@dataclass(frozen=True, kw_only=True)
class TheoryConfig(PromptOptions, ModelOptions):
    """The exact theory of sharpening on a small model."""

    model: str = option("game24 (ships with sharpen), a model folder, or a hub id", "")
    out: str = required("run directory; the same command again goes on where it stopped")
    max_new_tokens: int = option("completions end within so many tokens", 256)
    gamma: float = option("y*_gamma: completions within 1 - gamma of the best", 0.0)
    max_expansions: int = option("give up on a prompt, unproved, after so many prefixes", 20000)
    deltas: list[float] = field(
        default_factory=lambda: [0.5, 0.1, 0.05, 0.01],
        metadata={"help": "miss rates at which to say what best-of-N needs"},
    )
    policy: str | None = option("a second model, judged by its mass on the first one's y*")
    study: str | None = option("without a model: lower-bound, linear-softmax or error-shape")
    seed: int = option("of a study", 0)
    quick: bool = option("a study with few and small cases", False)
