"""What `tree_attention` promises beyond its values: bits, leaks, layouts, errors, routes."""

import importlib
import mmap

import pytest
import torch

from helpers.tree_oracle import TREES, attention_problem, grow, tree_of, values_and_gradients
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.tree import Tree
from sharpen_kernels.tree_attention import tree_attention

op = importlib.import_module("sharpen_kernels.tree_attention")
OPTIONS = [{}, {"window": 24}, {"softcap": 3.0}]
EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_siblings_in_another_order_give_the_same(options, device):
    problem = attention_problem(tree_of((30, 40, 7, (5, 33, 2))), device=device)
    # the last of the siblings is of 5 + 33 + 2 tokens
    order = [*range(30), *range(77, 117), *range(70, 77), *range(30, 70)]
    other = {name: problem[name][:, order] for name in "qkv"}
    other["tree"] = tree_of((30, (5, 33, 2), 7, 40)).to(device)
    want = values_and_gradients(tree_attention, problem, **options)
    got = values_and_gradients(tree_attention, other, **options)
    torch.testing.assert_close(got["out"], want["out"][:, order])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_splitting_a_run_changes_nothing(options, device):
    """Runs are maximal, so a chain is a chain however its pieces were given."""
    pieces, whole = grow((20, (13, (50, 9)))), grow(92)
    assert pieces == whole
    problem = attention_problem(Tree.of(torch.tensor(pieces)), device=device)
    one = attention_problem(Tree.of(torch.tensor(whole)), device=device)
    same = {**one, **{name: problem[name] for name in "qkv"}}
    torch.testing.assert_close(
        tree_attention(**problem, **options), tree_attention(**same, **options), **EXACT
    )


def beside(problem, before, inner, after):
    """The problem, whose tree is `inner`, between two other trees; and where it lies there."""
    device = problem["q"].device
    lengths = [len(grow(*items)) for items in (before, inner, after)]
    place = slice(lengths[0], lengths[0] + lengths[1])
    found = {"tree": tree_of(*before, *inner, *after).to(device)}
    for name in "qkv":
        x = problem[name]
        wide = torch.randn(sum(lengths), x.shape[0], x.shape[2], device=device)
        wide[place] = x.transpose(0, 1)
        found[name] = wide.transpose(0, 1)
    return found, place


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_unrelated_trees_change_nothing(options, device):
    inner = [(30, 40, 7), 9]
    problem = attention_problem(tree_of(*inner), device=device)
    wider, place = beside(problem, [(100, 20, 8)], inner, [(5, 3, 60)])
    want = values_and_gradients(tree_attention, problem, **options)
    weight = torch.randn(want["out"].shape, generator=torch.Generator().manual_seed(1)).to(device)

    leaves = [wider[name].requires_grad_() for name in "qkv"]
    out = tree_attention(**wider, **options)[:, place]
    grads = torch.autograd.grad(out, leaves, weight)
    # the trees before have 128 tokens: what a kernel needs to promise the same bits
    exact = EXACT if INTERPRETED or device == "cuda" else {}
    torch.testing.assert_close(out.detach(), want["out"], **exact)
    for name, grad in zip("qkv", grads, strict=True):
        torch.testing.assert_close(grad[:, place], want[f"d{name}"], **exact)
        grad[:, place] = 0
        assert not grad.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("leaf", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bad_numbers_stay_in_their_branch(options, leaf, value, device):
    """A completion of 7 tokens goes bad; its prompt's gradients may, its siblings' may not."""
    tree = tree_of((20, 9, 7, 12), 6)
    problem = attention_problem(tree, device=device)
    bad, prompt = slice(29, 36), slice(0, 20)
    weight = torch.randn(4, tree.T, 16, device=device)
    leaves = {name: problem[name].clone() for name in "qkv"} | {"dout": weight}
    leaves[leaf][:, bad] = value
    dout = leaves.pop("dout")
    for x in leaves.values():
        x.requires_grad_()
    out = tree_attention(**leaves, tree=problem["tree"], **options)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    clean = torch.ones(tree.T, dtype=torch.bool)
    clean[bad] = False
    assert out[:, clean].isfinite().all()
    # PyTorch's own flash attention for CPUs may lose the nan of a key
    if leaf in "qv":
        assert not out[:, bad].isfinite().all()
    clean[prompt] = False
    for name, grad in zip("qkv", grads, strict=True):
        assert grad[:, clean].isfinite().all(), name
    assert grads[0][:, prompt].isfinite().all()
    if leaf == "dout":
        assert not grads[2][:, prompt].isfinite().all()


@pytest.mark.parametrize("implementation", ["auto", "cascade"])
def test_empty_row(implementation, device):
    problem = attention_problem(Tree.chain([]), device=device, sinks=True)
    got = values_and_gradients(tree_attention, problem, implementation=implementation)
    shapes = {name: tuple(x.shape) for name, x in got.items()}
    want = {"out": (4, 0, 16), "dq": (4, 0, 16), "dk": (2, 0, 16), "dv": (2, 0, 16)}
    assert shapes == want | {"dsinks": (4,)}
    assert not got["dsinks"].any()


def test_any_strides_but_the_last(device):
    problem = attention_problem(TREES["a prompt and ragged completions"], device=device)
    want = values_and_gradients(tree_attention, problem)
    packed = torch.cat([problem[name].transpose(0, 1) for name in "qkv"], dim=1)  # [T, H + .., K]
    views = dict(zip("qkv", packed.transpose(0, 1).split((4, 2, 2)), strict=True))
    assert views["k"].stride(1) == 8 * 16
    plain = {name: problem[name].contiguous() for name in "qkv"}
    for other in (views, plain):
        got = values_and_gradients(tree_attention, problem | other)
        for name, x in got.items():
            torch.testing.assert_close(x, want[name])
    assert want["out"].transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("sinks", [False, True])
def test_custom_op_contract(sinks, device):
    tree = tree_of((9, 4, 5)).to(device)
    problem = attention_problem(tree, device=device, sinks=sinks)
    leaves = [problem[name].requires_grad_() for name in "qkv"]
    sink = problem["sinks"].requires_grad_() if sinks else None
    args = (*leaves, sink, tree.end, tree.position, tree.table, 0.25, None, 7, "auto")
    torch.library.opcheck(torch.ops.sharpen.tree_attention, args)


def test_compiles_without_a_break(device):
    problem = attention_problem(tree_of((9, 4, 5)), device=device)
    tree = problem.pop("tree")

    def fn(q, k, v):
        return tree_attention(q * 2, k, v, tree, window=7).square()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**problem), fn(**problem))


def test_second_derivative_is_refused(device):
    problem = attention_problem(tree_of(3), device=device)
    q = problem["q"].requires_grad_()
    out = tree_attention(**(problem | {"q": q}))
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        dq.sum().backward()


def test_route_is_chosen_by_device_and_argument(device):
    q = torch.zeros(1, 1, 16, device=device)

    def module(name, x=q):
        return op._module(name, x).__name__.rpartition("_")[2]

    assert module("auto") == ("triton" if INTERPRETED or device == "cuda" else "cpu")
    assert module("cascade") == module("auto", q.double()) == "cpu"
    with pytest.raises(ValueError, match=r'"triton" wants .* got torch.float64 on'):
        module("triton", q.double())
    with pytest.raises(ValueError, match=r"`implementation` must be one of .*, got 'fast'"):
        tree_attention(q, q, q, Tree.chain([1]).to(device), implementation="fast")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(1, 4, 5, 16)}, ValueError, r"`q` must be \[heads, tokens, head size\]"),
        ({"q": torch.zeros(3, 5, 16)}, ValueError, r"`q` must have a multiple of the Hkv=2 heads"),
        ({"k": torch.zeros(2, 5, 16).half()}, TypeError, r"`k` must be one of torch.float32"),
        (
            {"k": torch.zeros(2, 5, 8)},
            ValueError,
            r"`k` must have shape \(Hkv, T, K\)=\(2, 5, 16\)",
        ),
        ({"v": torch.zeros(1, 5, 16)}, ValueError, r"`v` must have shape \(Hkv, T, Kv\)"),
        ({"v": torch.zeros(2, 16, 5).mT}, ValueError, r"of stride 1, got 16 of stride 5; call"),
        ({"tree": Tree.chain([4])}, ValueError, r"`tree` must have the T=5 tokens of `q`, got 4"),
        ({"sinks": torch.zeros(2)}, ValueError, r"`sinks` must have shape \(H\)=\(4,\)"),
        ({"window": 0}, ValueError, r"`window` must be at least 1, the token itself, got 0"),
        ({"softcap": 0.0}, ValueError, r"`softcap` must be finite and above 0, got 0.0"),
        ({"scale": float("nan")}, ValueError, r"`scale` must be finite, got nan"),
    ],
)
def test_errors_name_the_argument_and_the_fix(change, error, message):
    problem = attention_problem(Tree.chain([5])) | change
    with pytest.raises(error, match=message):
        tree_attention(**problem)


@pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="offsets are of the Triton kernels"
)
def test_offsets_pass_32_bits(device):
    """Heads 2**31 elements apart, in memory of which only the two ends are ever touched."""
    problem = attention_problem(
        tree_of((5, 3, 4)), heads=(2, 2), dtype=torch.float16, device=device
    )
    want = values_and_gradients(tree_attention, problem)
    (H, T, K), far = problem["q"].shape, {}
    if device == "cuda":
        room = torch.zeros(2**31 + 3 * T * K, dtype=torch.float16, device=device)
    else:
        # MAP_NORESERVE: pages that nothing touches cost no memory, also where none may be promised
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
        memory = mmap.mmap(-1, 2 * (2**31 + 3 * T * K), flags=flags)
        room = torch.frombuffer(memory, dtype=torch.float16)
    for i, name in enumerate("qkv"):
        far[name] = room.as_strided((H, T, K), (2**31, K, 1), i * T * K)
        far[name].copy_(problem[name])
    leaves = [x.requires_grad_() for x in far.values()]
    out = tree_attention(*leaves, problem["tree"])
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    assert torch.equal(out, want["out"])
    grads = torch.autograd.grad(out, leaves, weight)
    for name, grad in zip("qkv", grads, strict=True):
        assert torch.equal(grad, want[f"d{name}"])
