"""A tiny random model of any causal-LM type that transformers ships, a layer of every kind."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from bench._tiny_sizes import KINDS, OTHER, SMALL


def tiny_model(model_type: str) -> PreTrainedModel:
    """In eval mode, fp32, every bias and sink random too.

    Raises:
        Exception: Whatever the classes raise where these sizes do not fit together.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of small sizes; its text part where it has several."""
    kind = CONFIG_MAPPING[model_type]
    fields = _fields(kind) | OTHER.get(model_type, {})
    config = kind(**fields)
    text = config.get_text_config()
    if text is not config or not hasattr(config, "num_hidden_layers"):
        parts = {
            name: type(part)(**_fields(type(part)) | OTHER.get(part.model_type, {}))
            for name in config.sub_configs
            if (part := getattr(config, name, None)) is not None
        }
        config = kind(**parts)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _fields(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    default = kind()
    names = set(inspect.signature(kind.__init__).parameters) | set(vars(default))
    found = {name: value for name, value in SMALL.items() if name in names}
    # None where the class has None: another size follows from the others
    given = vars(default)
    found = {k: v for k, v in found.items() if given.get(k, v) is not None or k == "head_dim"}
    if "kv_lora_rank" in names and "num_key_value_heads" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found | _layers(default)


def _layers(default: PreTrainedConfig) -> dict[str, Any]:
    """One layer of every kind that the class has by default."""
    lists = {name: vars(default).get(name) for name in KINDS}
    lists = {k: v for k, v in lists.items() if isinstance(v, list) and isinstance(v[0], str)}
    if not lists:
        return {}
    whole = list(zip(*lists.values(), strict=False))
    chosen = sorted({whole.index(kinds) for kinds in whole})
    if len(chosen) == 1:  # a second layer of the one kind
        chosen = [0, 1]
    return {"num_hidden_layers": len(chosen)} | {
        name: [kinds[i] for i in chosen] for name, kinds in lists.items()
    }
