"""What `token_logprob` promises besides its numbers: op contract, gradcheck, memory, messages."""

import pytest
import torch

from logit_oracle import DIFFERENTIABLE, logit_problem, values
from sharpen_kernels import _token_logprob_torch as blocked
from sharpen_kernels import token_logprob
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.stats import Wanted

OP = torch.ops.sharpen.token_logprob


@pytest.mark.parametrize("stat", DIFFERENTIABLE)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.6}], ids=str)
def test_gradcheck(stat, options):
    problem = logit_problem(3, 11, S=7)
    mask = torch.ones(11, dtype=torch.bool)
    mask[3] = False
    problem["target"][[0, 2, 3]] = 5
    problem["target"] %= 10
    problem["target"][1] = -100
    problem["target"][problem["target"] == 3] = 4  # masked: its log-prob is -inf

    def fn(logits):
        call = problem | {"logits": logits}
        return values(call, (stat,), vocab_mask=mask, vocab_size=10, **options)[stat]

    leaf = problem["logits"].double().requires_grad_()
    assert torch.autograd.gradcheck(fn, leaf)


@pytest.mark.parametrize("S", [None, 6])
@pytest.mark.parametrize("stats", ["logprob,entropy,is_greedy", "lse,top1,topk_id", "topk,rank"])
def test_opcheck(S, stats, device):
    problem = logit_problem(4, 50, S=S, device=device)
    logits, target, rows = problem["logits"], problem["target"], problem["rows"]
    mask = torch.arange(50, device=device) != 9
    options = (0.7, 9.0, 48, -100)
    leaf = logits.clone().requires_grad_()
    torch.library.opcheck(OP, (leaf, target, rows, mask, *options, stats, 3.0, 2))
    found, *_, state = OP(logits, target, rows, mask, *options, stats, 3.0, 2)
    numbers = ",".join(Wanted(tuple(stats.split(","))).numbers)
    bwd = (torch.ones_like(found), state, logits, target, rows, mask, *options, numbers)
    torch.library.opcheck(torch.ops.sharpen.token_logprob_bwd, bwd)


def test_traces_without_a_graph_break(device):
    problem = logit_problem(4, 50, device=device)

    def loss(logits):
        found = token_logprob(logits, problem["target"], stats=("logprob", "entropy", "top1"))
        assert found.logprob is not None
        assert found.entropy is not None
        return found.logprob.sum() + found.entropy.sum()

    def gradient(fn):
        leaf = problem["logits"].clone().requires_grad_()
        return torch.autograd.grad(fn(leaf), leaf)[0]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(gradient(compiled), gradient(loss))


def test_each_device_takes_its_own_route(device, monkeypatch):
    from sharpen_kernels import _cpu_library
    from sharpen_kernels import _token_logprob_cpu as native
    from sharpen_kernels import _token_logprob_triton as fused

    taken = []
    for module, route in ((fused, "triton"), (native, "C++"), (blocked, "torch")):
        for step in ("forward", "backward"):
            fn = getattr(module, step)
            note = (route, step)
            monkeypatch.setattr(
                module, step, lambda *a, _fn=fn, _note=note: taken.append(_note) or _fn(*a)
            )
    problem = logit_problem(2, 9, device=device)
    own = "torch" if _cpu_library.load() is None else "C++"
    if INTERPRETED or device == "cuda":
        own = "triton"
    for logits in (problem["logits"], problem["logits"].double()):
        leaf = logits.requires_grad_()
        values(problem | {"logits": leaf}, ("logprob",))["logprob"].sum().backward()
    assert taken == [(r, step) for r in (own, "torch") for step in ("forward", "backward")]


x, t, m = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
BAD = [
    ({"logits": x[0]}, ValueError, r"`logits` must be 2-D, got shape \(4,\); unsqueeze"),
    ({"logits": x[None]}, ValueError, r"`logits` must be 2-D, got .*; flatten the leading"),
    ({"logits": x.int()}, TypeError, r"`logits` must be one of .* got torch.int32; convert it"),
    ({"target": t[:2]}, ValueError, r"`target` must have shape \(R\)=\(3,\), got \(2,\)"),
    ({"target": t[None]}, ValueError, r"`target` must be 1-D, got .* call `.flatten\(\)`"),
    ({"target": t.int()}, TypeError, r"`target` must be one of torch.int64, got torch.int32; con"),
    ({"target": t.to("meta")}, ValueError, r"`target` must be on cpu as `logits` is, got meta"),
    ({"rows": t[:2]}, ValueError, r"`rows` must have shape \(S\)=\(3,\), got \(2,\)"),
    ({"rows": t.float()}, TypeError, r"`rows` must be one of torch.int64, got torch.float32"),
    ({"vocab_mask": m[:3]}, ValueError, r"`vocab_mask` must have shape \(V\)=\(4,\), got \(3,\)"),
    ({"vocab_mask": t}, TypeError, r"`vocab_mask` must be one of torch.bool, got torch.int64"),
    ({"temperature": 0.0}, ValueError, r"`temperature` must be finite and above 0, got 0.0; for"),
    ({"softcap": -1.0}, ValueError, r"`softcap` must be finite and above 0, got -1.0; None"),
    ({"vocab_size": 5}, ValueError, r"`vocab_size` must be in 1\.\.4, the columns .* got 5"),
    ({"vocab_size": 0}, ValueError, r"`vocab_size` must be in 1\.\.4, .* got 0"),
    ({"stats": "logprob"}, ValueError, r"`stats` must be a tuple of names .* got 'logprob'"),
    ({"stats": ("perplexity",)}, ValueError, r"`stats` must .* 'top1', 'margin', 'rank', 'topk'"),
    ({"renyi_order": 0.0}, ValueError, r"`renyi_order` must be finite and above 0, got 0.0"),
    ({"k": 33}, ValueError, r"`k` must be in 1..32, got 33; for more, sort"),
    ({"stats": ()}, ValueError, r"`stats` must be a tuple of names"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_errors_say_name_wanted_got_fix(change, error, message):
    with pytest.raises(error, match=message):
        token_logprob(**{"logits": x, "target": t} | change)
