"""Other libraries' ways to score tokens from hidden rows and the head."""

import importlib

from bench.peers.finding import Peer, without_init


def _trl_head():
    apply = importlib.import_module("trl.kernels").ChunkedLogProbFunction.apply

    def asked(*outputs):
        return lambda x, w, t, b=None: apply(x, w, b, t, 1.0, 32_768, None, 1.0, outputs)

    bare, entropy, many = asked(), asked("entropy"), asked("entropy", "mean_logits", "is_top1")

    def statistics(x, w, t, b=None):
        logprob, entropy, _, mean, is_top1 = many(x, w, t, b)
        return logprob, entropy, mean, is_top1

    return {
        "logprob": lambda *args: bare(*args)[0],
        "entropy": lambda *args: entropy(*args)[:2],
        "statistics but self-certainty": statistics,
    }


def _liger_flce():
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyFunction.apply

    def logprob(x, w, t, b=None):
        return -loss(x, w, t, b, None, -100, 0.0, 0.0, "none")[0]

    return {"logprob": logprob}


def _liger_scaled():
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    loss = module.LigerFusedLinearScaledCrossEntropyFunction.apply

    def entropy(x, w, t):
        loss_and_entropy = loss(x, w, t, 1.0, -100, 1, True)
        return -loss_and_entropy[0], loss_and_entropy[1]

    return {"logprob": lambda x, w, t: -loss(x, w, t), "entropy": entropy}


def _liger_ppo():
    module = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo")
    apply = module._ChunkedSelectiveLogProbFunction.apply
    return {"logprob": lambda x, w, t, b=None: apply(x, w, t, b, 1.0, 4096)}


def _cce(impl: str):
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    options = {"reduction": "none", "impl": impl, "filter_eps": None}
    return {"logprob": lambda x, w, t: -loss(x, w, t, **options)}


def _verl():
    module = without_init("verl.utils.kernel.linear_cross_entropy")
    apply = module.LinearCrossEntropy.apply
    return {
        "logprob": lambda x, w, t: apply(x, w, t, 1.0, "none")[0],
        "entropy": lambda x, w, t: apply(x, w, t, 1.0, "none"),
    }


GPU = ("cuda", "interpreter")
HIDDEN = (
    Peer("TRL tiled head", _trl_head, rounds=True, takes_bias=True),
    Peer("Liger FLCE", _liger_flce, GPU, rounds=True, takes_bias=True),
    Peer("Liger scaled CE", _liger_scaled, rounds=True),
    Peer("Liger chunked PPO head", _liger_ppo, rounds=True, takes_bias=True),
    Peer("cut-cross-entropy compiled", lambda: _cce("torch_compile"), rounds=True),
    Peer("cut-cross-entropy", lambda: _cce("cce"), GPU),
    Peer("verl", _verl, GPU),
)
