"""Random models of real shapes, made where they run, and what N completions of a prompt cost."""

import copy
import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128_256, "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 211, "tie_word_embeddings": True,
    },
}  # fmt: skip


@functools.cache
def model_of(name: str, device: str, dtype: torch.dtype) -> Any:
    """In eval mode; logits of standard deviation 3; nothing ends a sequence."""
    sizes = dict(SHAPES[name])
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(
        sizes.pop("model_type"), max_position_embeddings=32_768, **sizes, **no_ids
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    nn.init.normal_(model.lm_head.weight, std=3 / sizes["hidden_size"] ** 0.5)
    return model


def twin(model: Any) -> Any:
    """Another model of the very same parameters: ours has hooks that a peer must not meet."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@dataclasses.dataclass(frozen=True)
class Prompted:
    """N completions of C tokens of one prompt of P tokens, under the model called `name`."""

    name: str
    P: int
    C: int
    N: int

    def __str__(self) -> str:
        return f"{self.name} P={self.P} C={self.C} N={self.N}"

    def ids(self, device: str) -> tuple[Tensor, Tensor]:
        """The prompt [P] and its completions [N, C]."""
        generator = torch.Generator().manual_seed(1)
        V = SHAPES[self.name]["vocab_size"]
        prompt = torch.randint(V, (self.P,), generator=generator)
        completions = torch.randint(V, (self.N, self.C), generator=generator)
        return prompt.to(device), completions.to(device)

    def tokens(self, *, shared: bool) -> int:
        """That the layers see."""
        once = self.P if shared else self.N * self.P
        return once + self.N * self.C

    def flops(self, *, shared: bool) -> float:
        """Forward: layers on every token, attention on every pair, the head on what predicts."""
        sizes = SHAPES[self.name]
        D, L, H = (sizes[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        kv = D // H * sizes["num_key_value_heads"]
        layer = 2 * D * D + 2 * D * kv + 3 * D * sizes["intermediate_size"]
        own = self.N * self.C * (self.C + 1) / 2 + self.N * self.C * self.P
        pairs = own + self.P * (self.P + 1) / 2 * (1 if shared else self.N)
        layers = L * (2 * layer * self.tokens(shared=shared) + 4 * D * pairs)
        return layers + 2 * D * sizes["vocab_size"] * self.N * self.C
