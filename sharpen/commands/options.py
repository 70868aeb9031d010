"""The options of every command: one dataclass a verb, made of groups that several verbs share.

A field is a flag: its name, type and default, its help text and short names. Nothing here needs
PyTorch or transformers, so that `sharpen VERB --help` and a wrong flag take no time.

    groups       ModelOptions, PromptOptions, DrawOptions, SamplerOptions, TrainOptions, ...
    verbs        BonConfig, ExportConfig, ..., XpoConfig
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

# the names in `sharpen.scoring.rewards.REWARDS`; those of the second line need answers
REWARDS_WITHOUT_ANSWERS = (
    "logprob",
    "mean_logprob",
    "neg_perplexity",
    "min_token",
    "self_certainty",
    "neg_entropy",
    "confidence",
    "confidence_lowest",
    "confidence_bottom",
    "confidence_tail",
)
REWARDS = (*REWARDS_WITHOUT_ANSWERS, "majority", "rpc")
# where an endpoint's key is looked for if no variable is named
OPENAI_HOST, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"


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

    def draw_settings(self) -> dict[str, Any]:
        """What the samples depend on."""
        return {field.name: getattr(self, field.name) for field in fields(DrawOptions)}


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

    def train_settings(self) -> dict[str, Any]:
        """What the weights depend on."""
        return {field.name: getattr(self, field.name) for field in fields(TrainOptions)}


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """Which OpenAI-compatible completions endpoint, and how patient to be with it."""

    endpoint: str | None = option(
        "draw from an OpenAI-compatible completions endpoint, such as https://api.openai.com/v1"
    )
    endpoint_model: str = option("its name there", "")
    endpoint_prompts: Literal["text", "ids"] = option(
        "text: any server; ids: token ids both ways (vLLM), with the tokenizer of --model", "text"
    )
    endpoint_key_env: str | None = option(
        f"environment variable that holds its key; default: {OPENAI_KEY} for {OPENAI_HOST}, else "
        "no key"
    )
    endpoint_concurrency: int = option("requests to it at a time", 8)
    endpoint_rpm: float | None = option("most requests begun in a minute; default: no limit")
    endpoint_timeout: float = option("seconds for one answer", 600.0)
    endpoint_tries: int = option("times that a request is sent, waits growing between", 8)
    endpoint_choices: int = option("most completions asked for in one request", 128)


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """How vLLM is made."""

    vllm: list[str] = field(
        default_factory=list,
        metadata={"help": "vllm: further arguments of vllm.LLM, as NAME=VALUE"},
    )


@dataclass(frozen=True, kw_only=True)
class EngineOptions(VllmOptions, EndpointOptions):
    """What draws the completions."""

    engine: Literal["transformers", "vllm"] = option(
        "what runs --model: transformers; vllm (in an environment that has it)", "transformers"
    )

    def engine_settings(self) -> dict[str, Any]:
        """What the samples depend on; nothing for transformers."""
        if self.endpoint is not None:
            return {
                "endpoint": self.endpoint,
                "endpoint_model": self.endpoint_model,
                "endpoint_prompts": self.endpoint_prompts,
                "endpoint_choices": self.endpoint_choices,
            }
        return {"engine": "vllm", "vllm": self.vllm} if self.engine == "vllm" else {}


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(EngineOptions, ModelOptions):
    """What draws completions, and the model that it draws them from."""

    model: str = option(
        "game24 (ships with sharpen), a model folder, or a hub id; with --endpoint: whose "
        "tokenizer and chat template, if any",
        "",
    )


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """How completions are drawn, if not from the model's own law."""

    sampler: Literal["model", "mh", "smc"] = option(
        "model: p(y|x); its power p(y|x)^alpha by mh: Metropolis-Hastings, smc: particles", "model"
    )
    alpha: float | None = option("mh, smc: the power, at least 1; default 4")
    steps: int | None = option("mh: moves of each chain; default 10")
    particles: int | None = option("smc: particles of each prompt; default 64")
    ramp: int | None = option("smc: tokens over which the power grows from 1; default 0")
    resample_every: int | None = option("smc: tokens between two looks at weights; default 16")
    resample_threshold: float | None = option(
        "smc: resample where the effective size is below this share of particles; default 0.5"
    )
    proposal_temperature: float | None = option(
        "mh, smc: temperature of the proposal; default 1/alpha"
    )

    def sampler_settings(self) -> dict[str, Any]:
        """What the samples depend on; nothing for the model's own law."""
        return {} if self.sampler == "model" else {"sampler": self.sampler, **self.given()}

    def given(self) -> dict[str, Any]:
        """The options of the power samplers that are set."""
        names = [field.name for field in fields(SamplerOptions) if field.name != "sampler"]
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainOptions, DrawOptions, PromptOptions, ModelOptions):
    """Options of every training."""

    out: str = required("run directory; the same command again goes on where it stopped")


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(TrainConfig):
    """Options of the trainings that sample once: SFT and RLHF."""

    split: str = option("split of the task, or several as A+B", "sharpen")
    reward: str = option(f"self-reward: {', '.join(REWARDS)}", "logprob")
    samples: str | None = option(
        "a file of `sharpen sample`, of which the first N a prompt are used instead of drawing"
    )
    scores: Literal["scorer", "sampler"] = option(
        "log-probs of the base: scorer: a forward pass over all samples; "
        "sampler: those kept while drawing, which cost nothing",
        "scorer",
    )


@dataclass(frozen=True, kw_only=True)
class BonConfig(DrawOptions, PromptOptions, SamplingOptions):
    """Best-of-N: sample, score, choose, report."""

    out: str = required("run directory; the same command again goes on where it stopped")
    reward: str = option(f"what to choose by: {', '.join(REWARDS)}", "logprob")
    scores: Literal["sampler", "scorer"] = option(
        "sampler: the log-probs kept while drawing, which cost nothing; "
        "scorer: an exact forward pass over all samples",
        "sampler",
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Scored samples to TRL's data sets."""

    input: str = required("JSON lines file of `sharpen score`, or of `sharpen sample`")
    shape: Literal["sft", "dpo", "kto", "prompt", "tokens"] = required(
        "sft: the best completions; dpo: pairs; kto: good and bad ones; prompt: prompts alone; "
        "tokens: the best as token ids"
    )
    out: str = required("file to write: .jsonl, or .parquet")
    reward: str | None = option(
        f"what to choose by: one that the records hold, or {', '.join(REWARDS)}"
    )
    top: int = option("sft, tokens: completions a prompt, best first", 1)
    pairs: Literal["best_worst", "all", "random"] = option(
        "dpo: best_worst: one pair a prompt; all: every two; random: each completion in one pair",
        "best_worst",
    )
    margin: float = option("dpo: only pairs whose rewards differ by more", 0.0)
    seed: int = option("dpo: fixes random pairs", 0)
    threshold: float | None = option("kto: good are those of at least this reward, bad all others")
    share: float | None = option(
        "kto: good are the best SHARE of a prompt's completions, bad as many of the worst"
    )
    unique: bool = option("equal completions of a prompt count once", False)
    cut: bool = option("take completions that were cut at the token limit too", False)
    prompts: str | None = option(
        "the file that the samples were drawn from: its prompts, such as messages, go out instead "
        "of the text that a template made of them"
    )


@dataclass(frozen=True, kw_only=True)
class ParityConfig(VllmOptions, EndpointOptions, ModelOptions):
    """Compare two engines."""

    samples: str = required("JSON lines file of `sharpen sample`, or as `sharpen score` reads it")
    against: Literal["hf", "vllm", "server", "sampler"] = required(
        "hf: a plain forward of transformers; vllm: in this environment; server: --endpoint, by "
        "echo; sampler: the log-probs kept in the file"
    )
    out: str | None = option("JSON file to write the report to; it must not exist")
    tolerance: float = option("nats; more is exit code 1", 1e-3)
    measure: Literal["max", "mean", "p99"] = option(
        "of the differences a token, what the tolerance bounds", "max"
    )
    clip: float = option("PPO's epsilon, for the share of ratios outside it", 0.2)
    worst: int = option("tokens to show, those furthest apart", 10)
    limit: int | None = option("only the first LIMIT records")


@dataclass(frozen=True, kw_only=True)
class RlhfConfig(OfflineConfig):
    """RLHF-Sharpening: sample, score, pair, fit."""

    n: int = option("completions per prompt, at least 2", 8, ("-n",))
    beta: float = option(
        "weight of the KL term; of logprob the optimum is the power 1 + 1/beta of the base", 1.0
    )
    pairs: Literal["random", "all", "best_worst"] = option(
        "random: each completion in one pair; all: every two; best_worst: one pair a prompt",
        "random",
    )
    standardise: Literal["none", "all", "prompt"] = option(
        "divide rewards by their deviation within prompts: one for all prompts, or one a prompt; "
        "changes the optimum",
        "none",
    )
    loss: Literal["square", "dpo"] = option(
        "square: the paper's; dpo: a logistic loss of which is better, the common baseline",
        "square",
    )


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplerOptions, DrawOptions, PromptOptions, SamplingOptions):
    """Sample completions."""

    out: str = required("JSON lines file to write; the same command again goes on with it")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ModelOptions):
    """Rate given completions."""

    input: str = required("JSON lines file with `prompt` and `completion` or `completions`")
    out: str = required("JSON lines file to write; the same command again goes on with it")
    rewards: list[str] = field(
        default_factory=lambda: ["logprob", "mean_logprob"],
        metadata={"help": "rewards to compute, one or more"},
    )
    token_stats: bool = option("also write every token's statistics", False)
    add_eos: bool = option("end completions given as text with the end-of-sequence token", False)
    temperature: float = option("divides the model's logits: what sampling at it draws from", 1.0)


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ModelOptions):
    """Score over HTTP."""

    host: str = option(
        "address to listen on; any but this machine's own needs a key in SHARPEN_API_KEY",
        "127.0.0.1",
    )
    port: int = option("port to listen on; 0 takes a free one", 8000)
    name: str | None = option("what requests call the model; default: as `--model` says")
    reward: str = option("what trainers get that ask for one number", "logprob")
    unscorable_reward: float | None = option(
        "what they get for a sample that is empty, too long or has no finite log-prob; "
        "default: an error"
    )
    wait_ms: float = option("how long the newest request waits for others to share a batch", 5.0)
    max_queue: int = option("prompts that may wait; more get 429", 1024)
    max_n: int = option("completions or prompts of one request", 512)
    max_request_tokens: int = option("tokens of one request", 262_144)
    max_request_bytes: int = option("bytes of one request", 8 * 2**20)
    drain_seconds: float = option("how long to answer what was accepted, at the end", 60.0)


@dataclass(frozen=True, kw_only=True)
class SftConfig(OfflineConfig):
    """SFT-Sharpening: sample, score, choose, fit."""

    weights: Literal["best", "soft", "equal"] = option(
        "best: the best of N alone; soft: all, by exp(reward / soft_temperature), which is power "
        "self-distillation; equal: all alike, for samples of the target itself",
        "best",
    )
    soft_temperature: float = option(
        "lambda of soft weights; of logprob towards the power 1 + 1/lambda", 1.0
    )
    per: Literal["token", "sequence"] = option("what a step's likelihood is a mean over", "token")


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """List the tasks."""


@dataclass(frozen=True, kw_only=True)
class XpoConfig(TrainConfig):
    """XPO: rounds of sampling from the model being trained, and fitting."""

    split: str = option("split of the task, or several as A+B", "sharpen")
    n: int = option("pairs per prompt and round", 2, ("-n",))
    rounds: int = option("T: rounds of sampling and fitting", 3)
    reward: str = option(f"self-reward: {', '.join(REWARDS_WITHOUT_ANSWERS)}", "logprob")
    beta: float = option(
        "weight of the KL term; of logprob the optimum is the power 1 + 1/beta of the base", 1.0
    )
    alpha: str = option(
        "optimism; the loss gets alpha (V + R)^2 times the log-prob of base samples; a number, or "
        "auto: beta / (V + R) times exploration / sqrt(rounds), as in the proof",
        "1e-4",
    )
    exploration: float = option(
        "c of `--alpha auto`: 1 is the proof's for a linear softmax, and outweighs the squares "
        "where rounds are few",
        1.0,
    )
    validation: int = option("prompts held out to choose the round by", 32)
