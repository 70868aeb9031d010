"""A tiny Llama that vLLM for CPUs takes, and what it wants of the environment there."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sharpen.models import load_tokenizer

CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def save_llama(path):
    """The folder `path`, with heads of 32: the least that vLLM's CPU attention takes."""
    tokenizer = load_tokenizer("game24")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        # spread logits, and ends that are drawn
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    # a checkpoint's own sampling defaults, which must change nothing
    model.generation_config.update(top_k=2, repetition_penalty=1.5, do_sample=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
