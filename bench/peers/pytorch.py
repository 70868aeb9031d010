"""PyTorch's own ways to score tokens, from logits and from hidden rows."""

import torch
from torch.nn import functional

from bench.peers.finding import Peer


def log_softmax(z, t):
    """What users write."""
    return z.log_softmax(1).gather(1, t[:, None])[:, 0]


def log_softmax_statistics(z, t):
    """The four statistics from all log-probabilities; a masked column counts in none."""
    log_p, masked = z.log_softmax(1), z == float("-inf")
    n = (~masked).sum(1)
    finite = log_p.masked_fill(masked, 0.0)
    chosen = log_p.gather(1, t[:, None])[:, 0]
    certainty = -finite.sum(1) / n - n.log()
    return chosen, -(log_p.exp() * finite).sum(1), certainty, z.argmax(1) == t


def _logits_eager():
    return {
        "logprob": log_softmax,
        "entropy": lambda z, t: log_softmax_statistics(z, t)[:2],
        "statistics": log_softmax_statistics,
    }


def _indexed():
    return {"logprob": lambda z, t: z.gather(1, t[:, None])[:, 0] - z.logsumexp(1)}


def _logits_compiled():
    logprob = torch.compile(lambda z, t: log_softmax(z.float(), t), dynamic=False)
    four = torch.compile(lambda z, t: log_softmax_statistics(z.float(), t), dynamic=False)
    two = torch.compile(lambda z, t: log_softmax_statistics(z.float(), t)[:2], dynamic=False)
    return {"logprob": logprob, "entropy": two, "statistics": four}


def _hidden_eager():
    def logits(x, w, b):
        return (x @ w.T if b is None else torch.addmm(b, x, w.T)).float()

    def statistics(x, w, t, b=None):
        return log_softmax_statistics(logits(x, w, b), t)

    return {
        "logprob": lambda x, w, t, b=None: log_softmax(logits(x, w, b), t),
        "entropy": lambda x, w, t, b=None: statistics(x, w, t, b)[:2],
        "statistics": statistics,
    }


def _hidden_compiled():
    return {name: torch.compile(call, dynamic=False) for name, call in _hidden_eager().items()}


def _torch_fused():
    fused = functional.linear_cross_entropy

    def logprob(x, w, t, b=None):
        return -fused(x, w, t, linear_bias=b, reduction="none")

    return {"logprob": logprob}


def _gemm_chunks():
    """The vendor's product with fp32 results, 4096 rows at a time: the exact route of cuBLAS."""

    def logprob(x, w, t):
        done = []
        for rows, targets in zip(x.split(4096), t.split(4096), strict=True):
            z = torch.mm(rows, w.T, out_dtype=torch.float32)
            done.append(z.gather(1, targets[:, None])[:, 0] - z.logsumexp(1))
        return torch.cat(done)

    return {"logprob": logprob}


LOGITS = (
    Peer("log_softmax + gather", _logits_eager, rounds=True),
    Peer("gather - logsumexp", _indexed, rounds=True),
    Peer("torch.compile", _logits_compiled),
)
HIDDEN = (
    Peer("eager", _hidden_eager, rounds=True, takes_bias=True),
    Peer("torch.compile", _hidden_compiled, rounds=True, takes_bias=True),
    Peer("F.linear_cross_entropy", _torch_fused, rounds=True, takes_bias=True),
    Peer("cuBLAS chunks, fp32 out", _gemm_chunks, ("cuda",)),
)
