"""Tree attention by FlexAttention and flash-attn, peers of ours: what of them a CPU can run."""

import sys
from types import ModuleType

import pytest
import torch

from bench.peers.tree_attention import flash_tree_attention, flex_tree_attention
from helpers.tree_oracle import TREES, assert_matches_fp64, attention_problem, eager, tree_of
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels.tree_attention import tree_attention_reference

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no kernel of ours is in here")
OPTIONS = [{}, {"window": 24}, {"softcap": 3.0}, {"scale": 0.1}]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["a trie of four levels", "a forest of three", "one token"])
def test_flex_gives_the_values(name, options, sinks):
    problem = attention_problem(TREES[name], sinks=sinks)
    got = flex_tree_attention(**problem, **options)
    want = tree_attention_reference(**problem, **options)
    torch.testing.assert_close(got, want)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="FlexAttention has gradients on GPUs only"
)
@pytest.mark.parametrize("options", [*OPTIONS, {"sinks": True}], ids=str)
def test_flex_is_as_accurate_as_torch(options):
    options = dict(options)
    problem = attention_problem(
        TREES["a trie of four levels"], device="cuda", sinks=options.pop("sinks", False)
    )

    assert_matches_fp64(problem, flex_tree_attention, **options)


def varlen(q, k, cu_q, cu_k, rest):
    """Logits of flash-attn's ragged call [H, rows, cols], and which of them count."""
    z = q.transpose(0, 1) @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).permute(1, 2, 0)
    z = z * rest["softmax_scale"]
    cap = rest["softcap"]
    z = cap * torch.tanh(z / cap) if cap else z
    owner = [torch.arange(len(c) - 1).repeat_interleave(c.diff().long()) for c in (cu_q, cu_k)]
    seen = owner[0][:, None] == owner[1]
    if rest["causal"]:
        seen &= torch.arange(len(q))[:, None] >= torch.arange(len(k))
    assert (rest["window_size_left"], rest["dropout_p"], rest["alibi_slopes"]) == (-1, 0.0, None)
    return z.masked_fill(~seen, float("-inf"))


@pytest.fixture
def flash_attn(monkeypatch):
    """flash-attn 2's two functions as its source has them: no gradient of the log-sum-exp."""

    def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *, return_softmax, **rest):
        z = varlen(q, k, cu_seqlens_q, cu_seqlens_k, rest)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).transpose(0, 1)
        return (z.softmax(2) @ v).transpose(0, 1), z.logsumexp(2), None, None

    def backward(dout, q, k, v, *tensors, cu_seqlens_q, cu_seqlens_k, **rest):
        out, softmax_lse, dq, dk, dv = tensors
        assert rest["deterministic"]
        groups, dy = q.shape[1] // v.shape[1], dout.transpose(0, 1)
        z = varlen(q, k, cu_seqlens_q, cu_seqlens_k, rest)
        p = torch.exp(z - softmax_lse[..., None])
        wide_k, wide_v = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
        dz = p * (dy @ wide_v.mT - (dout * out).sum(-1).T[..., None]) * rest["softmax_scale"]
        if rest["softcap"]:
            dz = dz * (1 - (z.nan_to_num(neginf=0) / rest["softcap"]).square())
        dq.copy_((dz @ wide_k).transpose(0, 1))
        of_keys = dz.mT @ q.transpose(0, 1), p.mT @ dy
        for grad, of_heads in zip((dk, dv), of_keys, strict=True):
            grad.copy_(of_heads.transpose(0, 1).unflatten(1, (-1, groups)).sum(2))

    interface = ModuleType("flash_attn.flash_attn_interface")
    interface.__dict__["_flash_attn_varlen_forward"] = forward
    interface.__dict__["_flash_attn_varlen_backward"] = backward
    package = ModuleType("flash_attn")
    package.__dict__["flash_attn_interface"] = interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"window": 1000}], ids=str)
@pytest.mark.parametrize("name", ["a trie of four levels", "a forest of three", "one token"])
def test_cascade_around_flash_attn(name, options, sinks):
    ulps = 8 if name == "one token" else 1
    assert_matches_fp64(
        attention_problem(TREES[name], sinks=sinks), flash_tree_attention, ulps=ulps, **options
    )


@pytest.mark.usefixtures("flash_attn")
def test_flash_attn_refuses_a_window_that_hides():
    problem = attention_problem(tree_of((9, 4, 5)))
    with pytest.raises(ValueError, match=r"`window` must hide nothing .* got 13 for .* 14 tokens"):
        flash_tree_attention(**problem, window=13)
    assert flash_tree_attention(**problem, window=14).shape == eager(**problem).shape
