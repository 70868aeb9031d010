"""Options that several commands share. Each dataclass is a group of flags."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from sharpen.sampling import SamplingConfig
from sharpen.training.options import FitOptions, more_arguments


def option(help_text: str, default: Any = None, aliases: tuple[str, ...] = ()) -> Any:
    """A flag with a default, its help text, and short names."""
    return field(default=default, metadata={"help": help_text, "aliases": list(aliases)})


def required(help_text: str) -> Any:
    """A flag that must be given."""
    return field(metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, where, and what it may do on this machine."""

    model: str = required("game24 (ships with sharpen), a model folder, or a hub id")
    device: str | None = option("where to run: cpu, cuda, cuda:1; default: a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "parameter dtype; auto: the checkpoint's on a GPU, float32 on a CPU", "auto"
    )
    max_tokens: int = option("tokens in one batch, padding included", 32768)
    trust_remote_code: bool = option("run model code that comes with the checkpoint", False)
    allow_pickle: bool = option("read pickled weights, which can run code", False)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Where the prompts come from: a task or a file."""

    task: str | None = option("a task by name; see `sharpen tasks`")
    split: str = option("split of the task, or several as A+B", "test")
    shots: int = option("worked examples of the task before each prompt", 0)
    prompts: str | None = option("a JSON lines file with `prompt` (text or messages)")
    limit: int | None = option("only the first LIMIT prompts")


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How completions are drawn."""

    n: int = option("completions per prompt", 50, ("-n",))
    temperature: float = option("0 is greedy, 1 the model's own distribution", 1.0)
    top_p: float = option("draw from the smallest set of tokens with this mass", 1.0)
    max_new_tokens: int = option("cut completions here; a cut one never wins", 256)
    seed: int = option("fixes every draw, together with prompt and sample index", 0)

    def sampling(self) -> SamplingConfig:
        """These options as the sampler takes them.

        Raises:
            InputError: If a value is out of its range.
        """
        return SamplingConfig(**self.draw_settings())

    def draw_settings(self) -> dict[str, Any]:
        """What the samples depend on."""
        names = ("n", "temperature", "top_p", "max_new_tokens", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How weights are fitted."""

    lr: float = option("peak learning rate of AdamW; falls linearly to 0", 1e-4)
    epochs: float = option("passes over all prompts", 1.0)
    batch: int = option("prompts a step, each with all of its completions", 8)
    lora_rank: int = option("rank of LoRA adapters, merged in the end; 0 trains all weights", 0)
    save_every: int = option("steps between checkpoints; a killed run goes on from the last", 100)
    trainer: list[str] = field(
        default_factory=list,
        metadata={"help": "further fields of transformers.TrainingArguments, as NAME=VALUE"},
    )

    def fitting(self, *, seed: int, max_tokens: int) -> FitOptions:
        """These options as `fit` takes them.

        Raises:
            InputError: If a value is out of its range, or `trainer` is malformed.
        """
        return FitOptions(
            lr=self.lr,
            epochs=self.epochs,
            batch=self.batch,
            lora_rank=self.lora_rank,
            save_every=self.save_every,
            seed=seed,
            max_tokens=max_tokens,
            more=more_arguments(self.trainer),
        )

    def train_settings(self) -> dict[str, Any]:
        """What the weights depend on."""
        return {field.name: getattr(self, field.name) for field in fields(TrainOptions)}
