"""A tiny random model of any causal-LM type that transformers ships, a layer of every kind."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

V, D, CONTEXT = 293, 32, 256
# by size, the names that configurations have for it; a class takes those that it has
SIZES: tuple[tuple[float, str], ...] = (
    (V, "vocab_size vocab_size_per_layer_input"),
    (0, "pad_token_id"),
    (
        1,
        "bos_token_id n_shared_experts n_group topk_group first_k_dense_replace "
        "mamba_n_groups n_groups decoder_sparse_step",
    ),
    (
        2,
        "eos_token_id num_hidden_layers n_layer n_layers num_layers decoder_layers "
        "encoder_layers num_key_value_heads num_experts_per_tok moe_topk top_k "
        "mamba_expand expand linear_num_key_heads",
    ),
    (D, "hidden_size n_embd d_model dim embed_dim emb_dim embedding_size lru_width"),
    (
        48,
        "intermediate_size ffn_dim d_ff ffn_hidden_size n_inner decoder_ffn_dim "
        "encoder_ffn_dim intermediate_size_mlp block_ff_dim",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads rotary_dim num_experts num_local_experts "
        "n_routed_experts mamba_num_heads linear_num_value_heads",
    ),
    (
        8,
        "head_dim global_head_dim attention_chunk_size qk_rope_head_dim qk_nope_head_dim "
        "mamba_n_heads mamba_d_head mamba_d_state mamba_head_dim ssm_state_size "
        "state_size linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input "
        "query_pre_attn_scalar block_multiple_of",
    ),
    (CONTEXT, "max_position_embeddings n_positions n_ctx max_seq_len"),
    # wide enough that logits spread over nats, so that a wrong position shows
    (0.3, "initializer_range init_std"),
    (5, "sliding_window attention_window_size"),
    (16, "moe_intermediate_size shared_expert_intermediate_size kv_lora_rank q_lora_rank"),
    (12, "v_head_dim"),
    (64, "mamba_d_ssm"),
)
SMALL: dict[str, Any] = {name: size for size, names in SIZES for name in names.split()}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")  # lists, an entry a layer
# what a type needs besides, or cannot take
OTHER: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "biogpt": {"num_key_value_heads": None},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "layer_types": None,
        "topk_method": "greedy",
        "head_dim": 8,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_ssm": 32, "mamba_expand": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"interleave_moe_layer_step": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "expand": 1},
    "qwen3_next": {"initializer_range": 0.1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 512,
        "split_ngram_parts": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds": False,
        "is_decoder": True,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "attn_layers": ["local", "local"],
        "attention_head_size": 8,
    },
    "xlstm": {"qk_dim_factor": 1.0, "hidden_size": 64, "embedding_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}


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
