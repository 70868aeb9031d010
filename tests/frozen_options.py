"""The options of every verb: a name that is here stays, whoever has it in a script."""

MODEL = ["model", "device", "dtype", "max_tokens", "trust_remote_code", "allow_pickle"]
PROMPTS = ["task", "split", "shots", "prompts", "limit"]
DRAW = ["n", "temperature", "top_p", "max_new_tokens", "seed"]
SAMPLER = ["sampler", "alpha", "steps", "particles", "ramp", "proposal_temperature"]
FIT = ["lr", "epochs", "batch", "lora_rank", "save_every", "trainer"]
TRAIN = [*MODEL, *PROMPTS, *DRAW, *FIT, "out", "reward"]
EXPORT = ["input", "shape", "out", "reward", "top", "unique", "cut", "prompts"]
OPTIONS = {
    "bon": [*MODEL, *PROMPTS, *DRAW, "out", "reward", "scores"],
    "export": [*EXPORT, "pairs", "margin", "seed", "threshold", "share"],
    "rlhf": [*TRAIN, "samples", "scores", "beta", "pairs", "standardise", "loss"],
    "sample": [*MODEL, *PROMPTS, *DRAW, *SAMPLER, "out"],
    "score": [*MODEL, "input", "out", "rewards", "token_stats", "add_eos"],
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
    "xpo": [*TRAIN, "beta", "alpha", "rounds", "validation"],
}

# verbs that hand their arguments to another program
FORWARDED = ["lm-eval"]
