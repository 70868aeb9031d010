"""The cascade: its plan meets each pair once, its gradients are exact, a naive merge's are not."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tree_oracle import TREES, assert_matches_fp64, attention_problem, tree_of, trees
from sharpen_kernels import _tree_attention_cpu as cascade
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels._tree_attention_cpu import BAND, SMALL, plan_of
from sharpen_kernels.tree import Rule, Tree, tree_mask
from sharpen_kernels.tree_attention import tree_attention, tree_attention_reference

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing of the cascade is Triton's")

cascaded = functools.partial(tree_attention, implementation="cascade")
LONG = [tree_of((300, (2, 290), 290, 290), 5), Tree.chain([2 * BAND + 50])]


def pairs_of(plan, tree, window):
    """How often each query meets each key in the plan's parts."""
    met = torch.zeros(tree.T, tree.T, dtype=torch.int64)
    seen = tree_mask(tree, window)
    for part in (*plan.own, *plan.cross):
        i, j = torch.meshgrid(torch.arange(part.n_rows), torch.arange(part.n_cols), indexing="ij")
        for copy in range(part.n):
            rows, cols = i + part.row + copy * part.step, j + part.col + copy * part.col_step
            distance = part.delta + i - j
            counts = {
                "full": torch.ones_like(i, dtype=torch.bool),
                "causal": i >= j,
                "band": (distance >= 0) & (distance < (window or tree.T)),
                "tree": seen[rows, cols],
            }[part.kind]
            assert part.kind == "tree" or counts.any(dim=1).all(), "a query of no key"
            met[rows, cols] += counts
    return met


def check_plan(tree, window, small):
    plan = plan_of(tree.table, window, small)
    assert torch.equal(pairs_of(plan, tree, window), tree_mask(tree, window).long())
    queries = [q for p in plan.own for c in range(p.n) for q in range(p.row, p.row + p.n_rows)]
    assert len(queries) == sum(p.n * p.n_rows for p in plan.own) == tree.T
    assert all(part.is_own for part in plan.own)
    assert not any(part.is_own for part in plan.cross)


@settings(deadline=None, max_examples=150)
@given(
    tree=trees(max_tokens=200).filter(lambda tree: tree.T > 0),
    window=st.one_of(st.none(), st.integers(1, 150)),
    small=st.sampled_from((0, 8, SMALL)),
)
def test_plan_meets_each_pair_once(tree, window, small):
    check_plan(tree, window, small)


@pytest.mark.parametrize("small", [0, 8])
@pytest.mark.parametrize("window", range(1, 17))
def test_plan_at_every_edge_of_the_window(window, small):
    """From a window of the token itself to one that hides nothing: 15 tokens are the deepest."""
    check_plan(tree_of((5, 3, (4, 6, 2), 4, 4)), window, small)


@pytest.mark.parametrize("window", [None, 3, 200])
@pytest.mark.parametrize("tree", LONG, ids=["tree", "chain"])
def test_plan_of_runs_longer_than_a_block(tree, window):
    check_plan(tree, window, SMALL)


@pytest.mark.parametrize("window", [None, 3, 200])
@pytest.mark.parametrize("tree", LONG, ids=["tree", "chain"])
def test_runs_longer_than_a_block(tree, window):
    problem = attention_problem(tree, heads=(2, 1), sizes=(8, 8))
    assert_matches_fp64(problem, cascaded, window=window)
    assert_matches_fp64(problem, cascaded, window=window, softcap=3.0)


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 2.0}, {"window": 40}], ids=str)
@pytest.mark.parametrize("sizes", [(4, 4), (6, 3)], ids=str)
def test_gradients_are_those_of_differences(options, sizes):
    tree = tree_of((9, (3, 4, 4), 40, 1), 2)
    problem = attention_problem(tree, sizes=sizes, dtype=torch.float64, sinks=True)
    leaves = [problem.pop(name).double().requires_grad_() for name in ("q", "k", "v", "sinks")]

    def fn(q, k, v, sinks):
        rest = {"sinks": sinks, "implementation": "cascade"} | options
        return tree_attention(q, k, v, tree, **rest)

    assert torch.autograd.gradcheck(fn, leaves, fast_mode=True)


def relative_gradient_error(fn, problem):
    """Of q, k and v together, against the dense oracle; and the error of the output."""
    leaves = [problem[name].double().requires_grad_() for name in ("q", "k", "v")]
    found = []
    for f in (fn, tree_attention_reference):
        out = f(*leaves, problem["tree"])
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        grads = torch.autograd.grad(out, leaves, weight)
        found.append((out.detach(), torch.cat([x.flatten() for x in grads])))
    (out, grad), (want, want_grad) = found
    return (out - want).abs().max().item(), ((grad - want_grad).norm() / want_grad.norm()).item()


class _CallWithoutLseGradient(torch.autograd.Function):
    """One attention call as libraries ship it: backward ignores the log-sum-exp's gradient."""

    @staticmethod
    def forward(ctx, q, k, v, causal):
        out, lse = cascade.flash(q, k, v, 0.0, causal, scale=1.0)
        ctx.causal = causal
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _dlse):
        saved = ctx.saved_tensors
        return *cascade.flash_backward(dout, *saved, 0.0, ctx.causal, scale=1.0), None


def naive_cascade(q, k, v, tree):
    """Prompt and completions in two calls, merged by log-sum-exp, differentiated call by call."""
    (prompt, *answers) = tree.runs
    q = q[None] * q.shape[2] ** -0.5
    k, v = k[None], v[None]
    own = [
        _CallWithoutLseGradient.apply(*(x[:, :, run.start : run.stop] for x in (q, k, v)), True)
        for run in answers
    ]
    head, tail = slice(0, prompt.stop), slice(prompt.stop, None)
    call = _CallWithoutLseGradient.apply
    first, _ = call(q[:, :, head], k[:, :, head], v[:, :, head], True)
    above, above_lse = _CallWithoutLseGradient.apply(
        q[:, :, tail], k[:, :, head], v[:, :, head], False
    )
    out, lse = (torch.cat(x, dim=2) for x in zip(*own, strict=True))
    share = torch.sigmoid(above_lse - lse)[..., None]
    return torch.cat([first, out + share * (above - out)], dim=2)[0]


def test_naive_merge_is_caught_and_ours_is_exact():
    problem = attention_problem(tree_of((40, 33, 50, 64)))
    value, gradient = relative_gradient_error(naive_cascade, problem)
    assert value < 1e-12
    assert gradient > 1e-2, "right output, wrong gradients: what every test of values misses"
    value, gradient = relative_gradient_error(cascaded, problem)
    assert value < 1e-12
    assert gradient < 1e-12


@pytest.mark.parametrize("name", ["a prompt and ragged completions", "short answers"])
def test_blocks_of_small_subtrees_change_rounding_alone(name, monkeypatch):
    problem = attention_problem(TREES[name], dtype=torch.float64)
    want = cascaded(**problem)
    monkeypatch.setattr(cascade, "plan_of", lambda table, window: plan_of(table, window, 0))
    torch.testing.assert_close(cascaded(**problem), want)


def test_settings_of_the_process_change_nothing():
    problem = attention_problem(TREES["a trie of four levels"])
    for options in ({}, {"softcap": 2.0}):
        want = cascaded(**problem, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(cascaded(**problem, **options), want)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 64}], ids=str)
def test_memory_grows_with_the_tokens_alone(options):
    """Neither direction holds a [T, T] tensor, which here would be 16 MiB a head."""
    tree = tree_of((1000, *[48] * 22))
    problem = attention_problem(tree, heads=(2, 1), sizes=(8, 8))
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            kept = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            largest.extend(x.untyped_storage().nbytes() for x in kept)
            return out

    rule = Rule(tree.end, tree.position, 1.0, options.get("softcap"), options.get("window"))
    q, k, v = (problem[name] for name in ("q", "k", "v"))
    with Sizes():
        out, lse = cascade.forward(q, k, v, None, tree.table, rule)
        cascade.backward(out, (q, k, v, out, lse), None, tree.table, rule)
    assert max(largest) <= 4 * cascade.BLOCK_ELEMENTS
