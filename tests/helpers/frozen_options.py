"""The options of every verb: a name that is here stays, whoever has it in a script."""

MODEL = ["model", "device", "dtype", "max_tokens", "trust_remote_code", "allow_pickle"]
PROMPTS = ["task", "split", "shots", "prompts", "limit"]
DRAW = ["n", "temperature", "top_p", "max_new_tokens", "seed"]
ENDPOINT = [
    "endpoint",
    "endpoint_model",
    "endpoint_prompts",
    "endpoint_key_env",
    "endpoint_concurrency",
    "endpoint_rpm",
    "endpoint_timeout",
    "endpoint_tries",
    "endpoint_choices",
]
ENGINE = ["engine", "vllm", *ENDPOINT]
SAMPLER = [
    "sampler",
    "alpha",
    "steps",
    "particles",
    "ramp",
    "resample_every",
    "resample_threshold",
    "proposal_temperature",
]
FIT = ["lr", "epochs", "batch", "lora_rank", "save_every", "trainer"]
TRAIN = [*MODEL, *PROMPTS, *DRAW, *FIT, "out", "reward"]
OPTIONS = {
    "bon": [*MODEL, *PROMPTS, *DRAW, *ENGINE, "out", "reward", "scores"],
    "export": [
        "input",
        "shape",
        "out",
        "reward",
        "top",
        "unique",
        "cut",
        "prompts",
        "pairs",
        "margin",
        "seed",
        "threshold",
        "share",
    ],
    "parity": [
        *MODEL,
        *ENDPOINT,
        "vllm",
        "samples",
        "against",
        "out",
        "tolerance",
        "measure",
        "clip",
        "worst",
        "limit",
    ],
    "rlhf": [*TRAIN, "samples", "scores", "beta", "pairs", "standardise", "loss"],
    "sample": [*MODEL, *PROMPTS, *DRAW, *SAMPLER, *ENGINE, "out"],
    "score": [*MODEL, "input", "out", "rewards", "token_stats", "add_eos", "temperature"],
    "serve": [
        *MODEL,
        "host",
        "port",
        "name",
        "reward",
        "wait_ms",
        "drain_seconds",
        "max_queue",
        "max_n",
        "max_request_tokens",
        "max_request_bytes",
        "unscorable_reward",
    ],
    "sft": [*TRAIN, "samples", "scores", "weights", "soft_temperature", "per"],
    "study": [
        *MODEL,
        "task",
        "out",
        "quick",
        "train_seeds",
        "seeds",
        "limit",
        "n",
        "few",
        "train_limit",
        "train_n",
        "max_new_tokens",
        "jobs",
    ],
    "tasks": [],
    "theory": [
        *MODEL,
        *PROMPTS,
        "out",
        "max_new_tokens",
        "gamma",
        "max_expansions",
        "deltas",
        "policy",
        "study",
        "seed",
        "quick",
    ],
    "xpo": [*TRAIN, "beta", "alpha", "exploration", "rounds", "validation"],
}
# those without a default: any value, and one of a choice
MUST = ("model", "out", "input", "task", "samples")
CHOICES = {"export": ["--shape=sft"], "parity": ["--against=hf"]}
# verbs that hand their arguments to another program
FORWARDED = ["lm-eval"]
