"""A tiny random model of every family that shares prompts: by a tree, or by a cache only."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.tiny import SHAPE

V = SHAPE["vocab_size"]
CONTEXT = 256
ALTERNATING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
# by transformers' model type; what stands behind a slash tells two of one type apart
TREE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, **MOE},
    "mistral/short window": {"head_dim": 8, "sliding_window": 5},
    "mistral/long window": {"head_dim": 8, "sliding_window": 60},
    "mixtral": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, **ALTERNATING},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **ALTERNATING},
    "cohere2": {"head_dim": 8, **ALTERNATING},
    "olmo3": ALTERNATING,
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        **MOE,
    },
}
CACHE: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "mamba_n_heads": 8, "mamba_expand": 2, "attn_layer_indices": [1]},
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "block_multiple_of": 8,
        "block_ff_dim": 48,
    },
    # its gated recurrence amplifies rounding at the initial range of the others
    "qwen3_next": {
        "initializer_range": 0.1,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        **MOE,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
    "llama4_text": {
        "head_dim": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 8,
        "interleave_moe_layer_step": 1,
    },
    "falcon_h1": {**MAMBA, "head_dim": 8, "mamba_d_ssm": 32, "mamba_expand": 1},
    "nemotron_h": {
        "head_dim": 8,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "expand": 1,
    },
}


def family(name: str, **changes: Any) -> Any:
    """A random fp32 model in eval mode; sinks and biases are random too."""
    fields = (TREE | CACHE)[name]
    shape = SHAPE | {"max_position_embeddings": CONTEXT}
    config = AutoConfig.for_model(name.partition("/")[0], **shape | fields | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("bias", "sinks")):
                parameter.normal_()
    return model.eval()
