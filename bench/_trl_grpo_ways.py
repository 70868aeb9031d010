"""Log-probs of one prompt's completions, as TRL's GRPO trains with them: its way and ours."""

import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench._sharing import Problem, by_padded_batch, llama
from sharpen.integrations.trl.shared_stats import SharedStats
from sharpen.models import load_tokenizer

OURS, THEIRS = "ours", "TRL"
Way = tuple[Any, Callable[[], Tensor]]


def trainer_of(trainer_class: Any, problem: Problem, device: str, dtype: torch.dtype) -> Any:
    """A trainer of the Llama, that is never trained."""
    data = importlib.import_module("datasets").Dataset.from_list([{"prompt": "1"}])
    args = importlib.import_module("trl").GRPOConfig(
        output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=device == "cpu", bf16=False,
        per_device_train_batch_size=problem.N, num_generations=problem.N, disable_tqdm=True,
    )  # fmt: skip
    return trainer_class(
        model=llama().to(device, dtype), args=args, train_dataset=data,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        processing_class=load_tokenizer("game24"),
    )  # fmt: skip


def ways(problem: Problem, device: str, dtype: torch.dtype) -> dict[str, Way]:
    """The model of each contender, and its log-probs [N x C]."""
    prompt, completions = (x.to(device) for x in problem.ids())
    ids = torch.cat([prompt.expand(problem.N, -1), completions], dim=1)
    mask = torch.ones_like(ids)
    if importlib.util.find_spec("trl") is None:
        print("without TRL, beside its logits alone")
        labels = ids.clone()
        labels[:, : problem.P] = -100
        own, plain = llama().to(device, dtype), llama().to(device, dtype)
        stats = SharedStats(own, outputs=("entropy",))
        return {
            OURS: (own, lambda: stats(ids, mask, labels)["log_probs"][:, -problem.C :].flatten()),
            "padded batch": (plain, lambda: by_padded_batch(plain, prompt, completions)),
        }
    found: dict[str, Way] = {}
    ours = importlib.import_module("sharpen.integrations.trl").SharedPrefixGRPOTrainer
    for name, kind in ((OURS, ours), (THEIRS, importlib.import_module("trl").GRPOTrainer)):
        trainer = trainer_of(kind, problem, device, dtype)

        def call(trainer: Any = trainer) -> Tensor:
            batch = trainer.model, ids, mask, problem.C
            method = trainer._get_per_token_logps_and_entropies
            return method(*batch, compute_entropy=True)[0].flatten()

        found[name] = trainer.model, call
    return found
