"""Other libraries' ways to score tokens from logits."""

import importlib

import torch

from bench.peers.finding import Peer, without_init


def _trl_logits():
    utils = importlib.import_module("trl.trainer.utils")
    return {
        "logprob": utils.selective_log_softmax,
        "entropy": utils.selective_log_softmax_and_entropy,
    }


def _trl_triton():
    fused = importlib.import_module("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
    utils = importlib.import_module("trl.trainer.utils")

    def entropy(z, t):
        # its dispatcher does so too: the kernel takes unit stride along the vocabulary only
        if z.stride(-1) != 1:
            return utils.selective_log_softmax_and_entropy(z, t)
        return fused(z, t)

    return {"logprob": lambda z, t: entropy(z, t)[0], "entropy": entropy}


def _flash_attn():
    loss = without_init("flash_attn.ops.triton.cross_entropy").cross_entropy_loss
    return {"logprob": lambda z, t: -loss(z, t)[0]}


def _liger_logits():
    module = importlib.import_module("liger_kernel.ops.cross_entropy")
    loss = module.LigerCrossEntropyFunction.apply

    def logprob(z, t):
        z = z.clone() if z.requires_grad else z
        return -loss(z, t, None, -100, 0.0, 0.0, "none", None, False)[0]

    return {"logprob": logprob}


def _liger_grpo():
    kernel = importlib.import_module("liger_kernel.ops.grpo_loss")._selective_log_softmax_kernel

    def logprob(z, t):
        # its launcher leaves out the last row of a sequence; this launch is its own, of every row
        if not z.is_contiguous():
            raise ValueError("its launcher asserts contiguous logits")
        R, V = z.shape
        out = z.new_zeros(R, dtype=torch.float32)
        if R:
            strides = (0, t.stride(0), 0, 0)
            launch = {"BLOCK_N": 2048, "num_stages": 4, "num_warps": 1}
            kernel[(1, R)](z, t, out, None, 1.0, *strides, R, V, **launch)
        return out

    return {"logprob": logprob}


GPU = ("cuda", "interpreter")
LOGITS = (
    Peer("TRL selective_log_softmax", _trl_logits, ("cpu",), rounds=True),
    Peer("TRL Triton", _trl_triton, GPU),
    Peer("flash-attn cross entropy", _flash_attn, GPU),
    Peer("Liger cross entropy", _liger_logits, GPU, rounds=True),
    Peer("Liger GRPO log-softmax", _liger_grpo, GPU),
)
