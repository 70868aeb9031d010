"""`token_logprob` beside PyTorch's own fp32, both against fp64."""

import torch

from helpers.oracle import assert_as_accurate
from sharpen_kernels.stats import DIFFERENTIABLE, NAMES
from sharpen_kernels.token_logprob import token_logprob, token_logprob_reference


def logit_problem(R, V, *, S=None, dtype=torch.float32, device="cpu"):
    """Arguments of a call: logits of standard deviation 3, as trained models have; S pairs."""
    return {
        "logits": (3 * torch.randn(R, V, device=device)).to(dtype),
        "target": torch.randint(V, (R if S is None else S,), device=device),
        "rows": None if S is None else torch.randint(R, (S,), device=device),
    }


def values(problem, stats=NAMES, *, fn=token_logprob, **options):
    """The tensors of `stats`, by name; no other field is set."""
    found = vars(fn(**problem, stats=stats, **options))
    assert {name for name, x in found.items() if x is not None} == set(stats)
    return {name: found[name] for name in stats}


def values_and_gradient(fn, problem, stats=NAMES, dtype=None, **options):
    """Values of `stats`, and the gradient of their randomly weighted sum as `dlogits`."""
    x = problem["logits"]
    leaf = x.detach().to(dtype or x.dtype).requires_grad_()
    out = values(problem | {"logits": leaf}, stats, fn=fn, **options)
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), device=x.device, dtype=torch.float64)
    for name in stats:
        weight = torch.randn(out[name].shape, generator=generator).to(loss.device)
        if name in DIFFERENTIABLE:
            loss = loss + (out[name] * weight.to(out[name].dtype)).sum()
    if loss.requires_grad:
        (out["dlogits"],) = torch.autograd.grad(loss, leaf)
    return {name: x.detach() for name, x in out.items()}


def assert_matches_fp64(problem, stats=NAMES, **options):
    """Values and gradient as close to fp64 as PyTorch's own fp32, within a factor of 2."""
    got = values_and_gradient(token_logprob, problem, stats, **options)
    low = values_and_gradient(token_logprob_reference, problem, stats, torch.float32, **options)
    truth = values_and_gradient(token_logprob_reference, problem, stats, torch.float64, **options)
    assert set(got) == set(truth)
    for name, x in got.items():
        assert_as_accurate(name, x, low[name], truth[name])
    return got
