"""What the op promises besides its numbers: memory, op contract, gradcheck, routes, messages."""

import doctest
import importlib
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oracle import DIFFERENTIABLE, head_problem, values
from sharpen_kernels import TokenStats, _cpu_library, linear_logprob
from sharpen_kernels import _linear_logprob_cpu as native
from sharpen_kernels import _linear_logprob_torch as blocked
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels._head import Head, Transform
from sharpen_kernels._state import Pairs, finish
from sharpen_kernels.stats import NAMES, Wanted

OP = torch.ops.sharpen.linear_logprob


class LiveBytes(TorchDispatchMode):
    """The peak, in bytes, of what the ops under this mode have made and still hold."""

    def __init__(self):
        super().__init__()
        self.holders, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        taken = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        for x in filter(is_tensor, tree_leaves(out)):
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self.holders:
                if key in taken:
                    continue  # a view of an input
                self.holders[key] = 0
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
            self.holders[key] += 1
            weakref.finalize(x, self.release, key, storage.nbytes())
        return out

    def release(self, key, nbytes):
        self.holders[key] -= 1
        if self.holders[key] == 0:
            del self.holders[key]
            self.live -= nbytes


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def is_float(x):
    return is_tensor(x) and x.is_floating_point()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_native_workspace_is_bounded(dtype):
    if _cpu_library.load() is None:
        pytest.skip("no C++ kernel on this machine")
    # partials of all rows at once would be 115 MiB
    problem = head_problem(10_000, 40_000, 8, dtype=dtype)
    head = Head(problem["weight"], None, Transform(1.0, None, 40_000))
    pairs = Pairs.of(problem["target"], None, 10_000)
    with LiveBytes() as forward:
        native.forward(problem["hidden"], head, pairs, Wanted(NAMES))
    assert forward.peak < 24 * 2**20
    # in fp32 the logits are 20 MiB and the weight 128 MiB
    problem = head_problem(640, 8000, 4096, dtype=dtype)
    head = Head(problem["weight"], None, Transform(1.0, None, 8000))
    pairs = Pairs.of(problem["target"], None, 640)
    with LiveBytes() as backward:
        outputs = native.backward(
            {"logprob": torch.ones(640)}, torch.ones(4, 640), problem["hidden"], head, pairs,
            (True, True, False),
        )  # fmt: skip
    held = sum(x.nbytes for x in outputs if x is not None)
    wide = 640 * 4096 * 4 if dtype == torch.bfloat16 else 0  # the gradient of hidden in fp32
    assert backward.peak - held - wide < 64 * 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cpu_workspace_is_bounded(dtype):
    # in fp32 the logits are 84 MiB and the weight 80 MiB
    problem = head_problem(550, 40_000, 512, dtype=dtype)
    hidden = problem["hidden"]
    head = Head(problem["weight"], None, Transform(1.0, None, 40_000))
    pairs = Pairs.of(problem["target"], None, 550)
    with LiveBytes() as forward:
        part, _ = blocked.forward(hidden, head, pairs, Wanted(NAMES))
    state = finish(part).state()
    grads = {str(name): torch.ones(550) for name in DIFFERENTIABLE}
    with LiveBytes() as backward:
        outputs = blocked.backward(grads, state, hidden, head, pairs, (True, True, False))
    held = sum(x.nbytes for x in outputs if x is not None)
    assert forward.peak < 32 * 2**20
    assert backward.peak - held < 64 * 2**20


@pytest.mark.parametrize("stat", DIFFERENTIABLE)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.5}], ids=str)
@pytest.mark.usefixtures("small_segments")
def test_gradcheck(stat, options, device):
    problem = head_problem(3, 130, 4, S=5, device=device, bias=True)
    leaves = tuple(problem[x].double().requires_grad_() for x in ("hidden", "weight", "bias"))
    target, rows = problem["target"], problem["rows"]

    def fn(hidden, weight, bias):
        call = {"hidden": hidden, "weight": weight, "bias": bias, "target": target, "rows": rows}
        return values(call, (stat,), **options)[stat]

    assert torch.autograd.gradcheck(fn, leaves, fast_mode=True)


@pytest.mark.parametrize("S", [None, 6])
def test_opcheck(S, device):
    problem = head_problem(4, 50, 8, S=S, device=device, bias=True)
    names = ("hidden", "weight", "target", "rows", "bias")
    mask = torch.arange(50, device=device) % 3 > 0
    fixed = [*(problem[name] for name in names), mask]
    leaves = [x.clone().requires_grad_() if is_float(x) else x for x in fixed]
    options = (0.7, 9.0, 50, -100)
    torch.library.opcheck(OP, (*leaves, *options, ",".join(NAMES), 0.5, 4))
    numbers = "logprob,entropy,is_greedy"
    found, *_, state = OP(*fixed, *options, numbers, 2.0, 20)
    bwd = (torch.ones_like(found), state, *fixed, *options, numbers, [True, False, True])
    torch.library.opcheck(torch.ops.sharpen.linear_logprob_bwd, bwd)


def test_traces_without_a_graph_break(device):
    problem = head_problem(4, 50, 8, device=device)

    def gradient(fn):
        hidden = problem["hidden"].clone().requires_grad_()
        return torch.autograd.grad(fn(hidden), hidden)[0]

    def loss(hidden):
        found = linear_logprob(**problem | {"hidden": hidden}, stats=("logprob", "entropy"))
        assert found.logprob is not None
        assert found.entropy is not None
        return found.logprob.sum() + found.entropy.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(gradient(compiled), gradient(loss))


def test_each_device_takes_its_own_route(device, monkeypatch):
    from sharpen_kernels import _linear_logprob_triton as fused

    taken = []
    for module, route in ((fused, "triton"), (native, "native"), (blocked, "torch")):
        forward = module.forward
        monkeypatch.setattr(
            module, "forward", lambda *a, _f=forward, _r=route: taken.append(_r) or _f(*a)
        )
    problem = head_problem(2, 9, 4, device=device)
    values(problem)
    values(problem | {name: problem[name].double() for name in ("hidden", "weight")})
    plain = "native" if _cpu_library.load() else "torch"
    assert taken == ["triton" if INTERPRETED or device == "cuda" else plain, "torch"]


def test_docstring_example_runs():
    module = importlib.import_module("sharpen_kernels.linear_logprob")
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=3)


def test_token_stats_are_frozen():
    with pytest.raises(AttributeError, match="cannot assign"):
        TokenStats().logprob = torch.zeros(1)  # pyright: ignore[reportAttributeAccessIssue]


x, w, t = torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(3, dtype=torch.int64)
BAD = [
    ({"hidden": x[0]}, ValueError, r"`hidden` must be 2-D, got shape \(4,\); unsqueeze"),
    ({"hidden": x[None]}, ValueError, r"`hidden` must be 2-D, got .*; flatten the leading"),
    ({"hidden": x.int()}, TypeError, r"`hidden` must be one of .* got torch.int32; convert it"),
    ({"weight": w.T}, ValueError, r"`weight` must have shape \(V, D\)=\(4, 4\), got \(4, 9\)"),
    ({"target": t[:2]}, ValueError, r"`target` must have shape \(R\)=\(3,\), got \(2,\)"),
    ({"target": t[None]}, ValueError, r"`target` must be 1-D, got .* call `.flatten\(\)`"),
    ({"target": t.int()}, TypeError, r"`target` must be one of torch.int64, got torch.int32; con"),
    ({"rows": t[:2]}, ValueError, r"`rows` must have shape \(S\)=\(3,\), got \(2,\)"),
    ({"rows": t.float()}, TypeError, r"`rows` must be one of torch.int64, got torch.float32"),
    ({"bias": x[0]}, ValueError, r"`bias` must have shape \(V\)=\(9,\), got \(4,\)"),
    ({"bias": w[:, 0].int()}, TypeError, r"`bias` must be one of .* got torch.int32"),
    ({"weight": w.to("meta")}, ValueError, r"`weight` must be on cpu as `hidden` is, got meta"),
    ({"temperature": 0.0}, ValueError, r"`temperature` must be finite and above 0, got 0.0; for"),
    ({"temperature": float("nan")}, ValueError, r"`temperature` must be finite"),
    ({"softcap": -1.0}, ValueError, r"`softcap` must be finite and above 0, got -1.0; None"),
    ({"vocab_size": 10}, ValueError, r"`vocab_size` must be in 1\.\.9, .* got 10"),
    ({"vocab_size": 0}, ValueError, r"`vocab_size` must be in 1\.\.9, .* got 0"),
    ({"stats": "logprob"}, ValueError, r"`stats` must be a tuple of names .* got 'logprob'"),
    ({"stats": ("perplexity",)}, ValueError, r"`stats` must .* \('logprob', 'lse', 'entropy'"),
    ({"stats": ()}, ValueError, r"`stats` must be a tuple of names"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_errors_say_name_wanted_got_fix(change, error, message):
    with pytest.raises(error, match=message):
        linear_logprob(**{"hidden": x, "weight": w, "target": t} | change)
