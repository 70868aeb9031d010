"""Random models of two layers, one per way to make logits, and the slow, obvious way to score."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

V, D = 293, 32
CONTEXT = 64
# values of many types, for configurations of many classes
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    # wide enough that logits spread over nats, so that a wrong scale or cap shows
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GPT_SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "n_embd": D,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, SHAPE),
    "llama-tied": (LlamaConfig, SHAPE | {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, SHAPE | {"head_dim": 8}),
    "mistral-window": (MistralConfig, SHAPE | {"head_dim": 8, "sliding_window": 5}),
    "phi3": (Phi3Config, SHAPE),
    # a cap that bites at the logits of this model
    "gemma2-softcap": (
        Gemma2Config,
        SHAPE
        | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
        | {"final_logit_softcapping": 3.0},
    ),
    "gpt2-tied": (GPT2Config, GPT_SHAPE),
    "gptj-bias": (GPTJConfig, GPT_SHAPE | {"rotary_dim": 4, "tie_word_embeddings": False}),
    "phi-bias": (PhiConfig, SHAPE),
    "cohere-multiplies": (CohereConfig, SHAPE | {"logit_scale": 0.25}),
    "granite-divides": (GraniteConfig, SHAPE | {"logits_scaling": 4.0}),
}


class OpaqueHead(nn.Module):
    """A head that is not a linear layer to the eye; with a cap, that the configuration hides."""

    def __init__(self, inner: nn.Module, cap: float | None = None):
        super().__init__()
        self.inner = inner
        self.cap = cap

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.inner(hidden)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


# models are Any here: tests reach into modules that transformers types as plain `Module`
def opaque(family: str = "llama", *, cap: float | None = 2.0, **changes: Any) -> Any:
    """`tiny` with an `OpaqueHead`."""
    model = tiny(family, **changes)
    model.set_output_embeddings(OpaqueHead(model.get_output_embeddings(), cap))
    return model


def tiny(family: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random fp32 model of one of `FAMILIES`, its configuration changed, in eval mode.

    Every bias is random too, where transformers starts it at zero.
    """
    config_class, fields = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**fields | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.eval()


def ragged(seed: int = 0, vocab_size: int = V) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts and completions with every shape that scoring meets.

    Prompts of one token and of many; groups of 4, 1, 0 and 3; completions that are empty, of one
    token, and longer than the sliding windows above.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(vocab_size, (n,), generator=generator).tolist()

    prompts = [ids(n) for n in (7, 1, 3, 12)]
    completions = [[ids(n) for n in group] for group in ((9, 1, 0, 4), (6,), (), (1, 17, 2))]
    return prompts, completions


def alone(
    model: PreTrainedModel,
    prompts: list[list[int]],
    completions: list[list[list[int]]],
    temperature: float = 1.0,
) -> Tensor:
    """Log-prob of each completion token, one sequence at a time, in the dtype of the logits."""
    weight = next(model.parameters())
    parts = [weight.new_zeros(0)]
    for prompt, group in zip(prompts, completions, strict=True):
        for completion in filter(len, group):
            ids = torch.tensor(prompt + completion, device=weight.device)
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
            rows = (logits / temperature).log_softmax(dim=1)
            parts.append(rows.gather(1, ids[len(prompt) :, None]).squeeze(1))
    return torch.cat(parts)
