"""N completions of one prompt of a random Llama: the padded batch, fp64, and who agrees with it.

Shared by every benchmark whose work is a prompt and its completions. Contenders must agree before
their times mean anything: log-probabilities with the model's own logits in fp64, gradients among
each other.

P prompt tokens, C tokens of a completion, N completions, V vocabulary, D hidden.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, D, V = 4, 256, 8192
TRUE_ROWS = 8  # completions whose log-probs are computed in fp64
# chosen; rounding is some 1e-5 of either
TOLERANCE_NATS = 1e-3
TOLERANCE_GRADIENT = 1e-3

Gradients = dict[str, Tensor]


def llama() -> Any:
    """Random, in eval mode; logits of standard deviation 3."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.1,
    )
    model: Any = LlamaForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.weight, std=3 / D**0.5)
    return model


@dataclasses.dataclass(frozen=True)
class Problem:
    """N completions of C tokens of one prompt of P tokens."""

    P: int
    C: int
    N: int

    def __str__(self) -> str:
        return f"P={self.P} C={self.C} N={self.N}"

    @property
    def flops(self) -> float:
        """Forward, of the layers on every token once and of the head on those that predict."""
        layers = sum(p.numel() for p in llama().model.layers.parameters())
        predicting = 1 + self.N * (self.C - 1)
        return 2.0 * (layers * (self.P + self.N * self.C) + D * V * predicting)

    @property
    def padded_gib(self) -> float:
        """About what the padded batch holds without gradients: logits thrice and one layer."""
        layer = self.N * (self.P + self.C) * (4 * D + 3 * 688)
        return 4 * (3 * self.N * self.C * V + layer) / 2**30

    def ids(self) -> tuple[Tensor, Tensor]:
        """The prompt [P] and its completions [N, C]."""
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(V, (self.P,), generator=generator)
        return prompt, torch.randint(V, (self.N, self.C), generator=generator)


def by_padded_batch(model: Any, prompt: Tensor, completions: Tensor) -> Tensor:
    """Log-probs [N x C] off the logits of whole sequences, those of the completions alone."""
    N, C = completions.shape
    whole = torch.cat([prompt.expand(N, -1), completions], dim=1)
    mask = torch.ones_like(whole)
    logits = model(input_ids=whole, attention_mask=mask, logits_to_keep=C + 1, use_cache=False)
    return gathered(logits.logits[:, :-1], completions)


def gathered(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probs, row by row, of `target` [N, C] under `logits` [N, C, V]; in fp32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(-1, dtype=wide).gather(2, target[..., None]).flatten()


def truth(problem: Problem) -> tuple[Tensor, Tensor]:
    """Some completions, and their log-probs [rows, C] by the model's own logits in fp64."""
    rows = torch.linspace(0, problem.N - 1, min(problem.N, TRUE_ROWS)).long()
    prompt, completions = problem.ids()
    with torch.no_grad():
        model = copy.deepcopy(llama()).double()
        found = [by_padded_batch(model, prompt, completions[row][None]) for row in rows]
    return rows, torch.stack(found)


def errors(problem: Problem | None, found: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest error of each contender's log-probs, nats, against the model's own logits in fp64.

    Those are of some completions. Without a problem: of ours, against the contender that is not.
    All log-probs are compared between contenders.

    Raises:
        RuntimeError: If one is off.
    """
    peer = next(x for name, x in found.items() if not name.startswith("ours"))
    apart = {name: _distance(x, peer) for name, x in found.items()}
    if max(apart.values()) > TOLERANCE_NATS:
        raise RuntimeError(f"log-probs differ, nats: {apart}")
    if problem is None:
        return {name: error for name, error in apart.items() if found[name] is not peer}
    rows, want = truth(problem)
    got = {name: x.view(problem.N, problem.C)[rows] for name, x in found.items()}
    return {name: _distance(x.double(), want) for name, x in got.items()}


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.shape == b.shape else float("inf")


def gradients(model: nn.Module) -> Gradients:
    """Of every parameter, copied."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_gradients(found: Mapping[str, Gradients]) -> float:
    """The largest difference between two contenders, of the parameter's largest gradient.

    Raises:
        RuntimeError: If one is off.
    """
    first, *others = found.values()
    worst = max(
        ((other[name] - g).abs().max() / g.abs().max()).item()
        for other in others
        for name, g in first.items()
    )
    if not worst <= TOLERANCE_GRADIENT:
        raise RuntimeError(f"gradients differ by {worst:.1e} of the largest")
    if any(g.isnan().any() for g in first.values()):
        raise RuntimeError("gradients are NaN")
    return worst
