"""Trees by name, attention problems on them, and how close to fp64 is close enough."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers.oracle import assert_as_accurate
from sharpen_kernels.tree import Tree, tree_mask
from sharpen_kernels.tree_attention import tree_attention, tree_attention_reference


def grow(*lengths, at=-1, parent=None):
    """Parents of a nested trie: each item is a run's length, or (length, *children)."""
    parent = [] if parent is None else parent
    for item in lengths:
        length, *children = item if isinstance(item, tuple) else (item,)
        for i in range(length):
            parent.append(at if i == 0 else len(parent) - 1)
        grow(*children, at=len(parent) - 1, parent=parent)
    return parent


def tree_of(*lengths) -> Tree:
    """`tree_of((5, 3, (2, 4, 4)))`: a run of 5 with a leaf of 3 and a run of 2 with two leaves."""
    return Tree.of(torch.tensor(grow(*lengths), dtype=torch.int64))


RAGGED = (1, 100, 7, 33, 64, 2, 31)
TREES = {
    "one token": tree_of(1),
    "a chain": tree_of(150),
    "chains side by side": Tree.chain([40, 40, 40, 3, 17]),
    "N=1, as two runs": tree_of((70, 9, 1)),
    "a prompt and ragged completions": tree_of((37, *RAGGED)),
    "a prompt and equal completions": tree_of((140, 40, 40, 40)),
    "a prompt of one token": tree_of((1, 33, 5, 60)),
    "short answers": tree_of((90, *[3] * 20)),
    "a trie of four levels": tree_of((50, (20, (1, 9, 40), 6), (130, (3, 35, 35), 1, (2, 3, 4)))),
    "a forest of three": tree_of((20, 8, 8), (1, *RAGGED[:3]), (64, (2, 50, 1), 129)),
}


@st.composite
def trees(draw, max_tokens=90):
    """Trees of a few forks, long runs and short ones."""
    path, parent = [], []
    while len(parent) < max_tokens:
        length = draw(st.sampled_from((0, 1, 2, 3, 17, 35, 64)))
        if length == 0:
            break
        del path[draw(st.integers(0, len(path))) :]
        for _ in range(min(length, max_tokens - len(parent))):
            parent.append(path[-1] if path else -1)
            path.append(len(parent) - 1)
    return Tree.of(torch.tensor(parent, dtype=torch.int64))


def attention_problem(
    tree, *, heads=(4, 2), sizes=(16, 16), dtype=torch.float32, device="cpu", sinks=False
):
    """Arguments of a call: logits of standard deviation 2, views as transformers hands them."""
    (H, Hkv), (K, Kv), T = heads, sizes, tree.T
    q, k, v = (
        torch.randn(T, n, size, device=device).to(dtype).transpose(0, 1)
        for n, size in ((H, K), (Hkv, K), (Hkv, Kv))
    )
    found = {"q": q * 2, "k": k, "v": v, "tree": tree.to(device)}
    return found | ({"sinks": torch.randn(H, device=device)} if sinks else {})


def eager(q, k, v, tree, *, window=None, softcap=None, sinks=None, scale=None) -> Tensor:
    """Attention as models write it: products in the dtype of `q`, the softmax in fp32."""
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
    z = q @ k.mT * (q.shape[2] ** -0.5 if scale is None else scale)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~tree_mask(tree, window), float("-inf"))
    if sinks is not None:
        z = torch.cat([z, sinks.to(z.dtype)[:, None, None].expand(-1, tree.T, 1)], dim=2)
    share = z.softmax(dim=2, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return share[:, :, : tree.T] @ v


def values_and_gradients(fn, problem, dtype=None, **options) -> dict[str, Tensor]:
    """Output, and gradients of its randomly weighted sum, by name."""
    problem, leaves = dict(problem), {}
    for name in ("q", "k", "v", "sinks"):
        if name in problem:
            x = problem[name].detach()
            leaves[name] = problem[name] = x.to(dtype or x.dtype).requires_grad_()
    out = fn(**problem, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), weight)
    found = {"out": out} | {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def assert_matches_fp64(problem, fn=tree_attention, *, ulps=1, **options):
    """Output and gradients are as near to fp64 as eager attention's, within a factor of 2."""
    got = values_and_gradients(fn, problem, **options)
    low = values_and_gradients(eager, problem, **options)
    truth = values_and_gradients(tree_attention_reference, problem, torch.float64, **options)
    for name, x in got.items():
        assert x.dtype == low[name].dtype
        # an ulp of the problem, for sinks of fp32 get theirs from an output in half precision
        ulp = torch.finfo(problem["q"].dtype).eps * max(1.0, truth[name].abs().max().item())
        # backward builds the softmax again out of `lse`, whose rounding eager's softmax never sees
        floor = ulps * ulp if name == "out" else 8 * ulps * ulp
        assert_as_accurate(name, x, low[name], truth[name], floor=floor)
    return got
