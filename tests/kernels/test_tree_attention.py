"""Values and gradients of `tree_attention`, judged beside eager attention, both against fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tree_oracle import (
    TREES,
    assert_matches_fp64,
    attention_problem,
    tree_of,
    trees,
    values_and_gradients,
)
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.tree_attention import tree_attention

# smaller than every prompt, between prompt and completion, larger than any sequence
WINDOWS = [2, 5, 60, 1000]
OPTIONS = [
    {"softcap": 3.0},
    {"scale": 0.1},
    {"sinks": True},
    {"window": 24, "sinks": True},
    {"window": 24, "softcap": 3.0, "sinks": True, "scale": 0.5},
]


# the interpreter takes seconds a call: each tree and each option once, not all pairs
SOME_TREES = ["a prompt and ragged completions"] if INTERPRETED else list(TREES)
HEADS = (2, 1) if INTERPRETED else (4, 2)


@pytest.fixture(autouse=True)
def _few_tiles(monkeypatch):
    """Tiles of 64 x 64 where fp32 has smaller ones: fewer programs to interpret."""
    if INTERPRETED:
        from sharpen_kernels import _tiles as tiles

        for kernel in ("fwd", "dq", "dkv"):
            for size in (64, 128):
                monkeypatch.setitem(tiles.TILINGS, (kernel, True, size), tiles.Tiling(64, 64, 4, 1))


def check(tree, device, *, sinks=False, heads=HEADS, sizes=(16, 16), dtype=torch.float32, **rest):
    # of one key the logit's gradient is a difference that eager attention makes exactly 0
    rest = {"ulps": 8 if tree.T == 1 else 1} | rest
    shape = {"heads": heads, "sizes": sizes, "dtype": dtype}
    assert_matches_fp64(attention_problem(tree, device=device, sinks=sinks, **shape), **rest)


@pytest.mark.parametrize("name", TREES)
def test_every_tree(name, device):
    check(TREES[name], device)
    check(TREES[name], device, window=24, softcap=3.0, sinks=True)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", SOME_TREES)
def test_window(name, window, device):
    check(TREES[name], device, window=window)


@pytest.mark.parametrize("name", SOME_TREES)
def test_window_of_the_token_itself_gives_its_value(name, device):
    problem = attention_problem(TREES[name], device=device)
    got = values_and_gradients(tree_attention, problem, window=1)
    torch.testing.assert_close(got["out"], problem["v"].repeat_interleave(2, dim=0))
    for name in ("dq", "dk"):
        assert got[name].abs().max() < 1e-5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", SOME_TREES)
def test_options(name, options, device):
    check(TREES[name], device, **options)


no_bf16 = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter truncates fp32 to bf16")
HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=no_bf16)]


@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(options, dtype, device):
    check(TREES["a prompt and ragged completions"], device, dtype=dtype, **options)


# multi-head, multi-query, groups; MLA's larger queries, larger values; not a power of two
@pytest.mark.parametrize("sizes", [(16, 16), (24, 12), (8, 32), (80, 80)], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 1), (6, 2)], ids=str)
def test_heads_and_head_sizes(heads, sizes, device):
    tree = tree_of((20, 35, 1, 9))
    check(tree, device, heads=heads, sizes=sizes)
    check(tree, device, heads=heads, sizes=sizes, window=24, softcap=3.0, sinks=True)


@pytest.mark.parametrize("size", [128, 256])
def test_large_heads(size, device):
    check(tree_of((20, 40, 7)), device, heads=(2, 1), sizes=(size, size), sinks=True)


@settings(deadline=None, max_examples=10 if INTERPRETED else 80)
@given(
    tree=trees(max_tokens=70 if INTERPRETED else 200).filter(lambda tree: tree.T > 0),
    window=st.one_of(st.none(), st.integers(1, 100)),
    softcap=st.sampled_from((None, 2.0)),
    sinks=st.booleans(),
    heads=st.sampled_from(((2, 1), (2, 2))),
)
def test_any_tree(tree, window, softcap, sinks, heads):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"window": window, "softcap": softcap}
    # few values: the error of eager attention can be luck
    check(tree, device, heads=heads, sizes=(16, 8), sinks=sinks, ulps=4, **options)
