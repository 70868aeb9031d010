"""Attention along the paths of a token tree: the prompt once, each completion on top of it.

    z[h, q, j] = softcap(scale * q[h, q] . k[g(h), j]),    softcap(u) = c tanh(u / c)
    lse[h, q]  = log(sum_j exp(z[h, q, j]) + exp(sinks[h])),    j an ancestor of q or q itself
    out[h, q]  = sum_j exp(z[h, q, j] - lse[h, q]) v[g(h), j]

The ancestors are the columns j <= q < end[j] (`Tree`), inside a sliding window those with
position[q] - position[j] < window.  On a GPU one online-softmax kernel reads that interval
(`_tree_attention_triton`), on a CPU the tree is cut into ordinary attention calls that are merged
by log-sum-exp, forward and backward (`_tree_attention_cpu`).

H query heads, Hkv key heads, head h reads g(h) = h // (H / Hkv), T packed tokens, K head size of
queries and keys, Kv of values.  Softmax and sums are fp32 (fp64 for fp64), memory is O(T).
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from . import _tree_attention_cpu as cascade
from ._checks import FLOATS, check_device, check_dtype, check_shape, runs_triton
from .tree import Rule, Tree, tree_mask

Implementation = Literal["auto", "cascade", "triton"]


def _module(name: str, q: Tensor):
    """The module that computes inside the op; each has the `forward` and `backward` of another."""
    can_triton = runs_triton(q, q.dtype)
    if name == "triton" and not can_triton:
        raise ValueError(
            '`implementation` "triton" wants Triton and fp16, bf16 or fp32 tensors on a GPU, got '
            f'{q.dtype} on {q.device}; use "cascade".'
        )
    if name == "triton" or (name == "auto" and can_triton):
        from . import _tree_attention_triton as triton_route

        return triton_route
    return cascade


@torch.library.custom_op("sharpen::tree_attention", mutates_args=())
def _tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    end: Tensor,
    position: Tensor,
    table: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Output [H, T, Kv] and log-sum-exp [H, T], a token's heads side by side in memory."""
    if q.shape[1] == 0:
        return _empty(q, q.shape[0], v.shape[2]), _empty_lse(q)
    rule = Rule(end, position, scale, softcap, window)
    return _module(implementation, q).forward(q, k, v, sinks, table, rule)


def _empty(like: Tensor, n_heads: int, width: int) -> Tensor:
    return like.new_empty((like.shape[1], n_heads, width)).transpose(0, 1)


def _empty_lse(q: Tensor) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((q.shape[1], q.shape[0]), dtype=dtype).T


@_tree_attention.register_fake
def _(q, k, v, *_):
    return _empty(q, q.shape[0], v.shape[2]), _empty_lse(q)


@torch.library.custom_op("sharpen::tree_attention_bwd", mutates_args=())
def _tree_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    end: Tensor,
    position: Tensor,
    table: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks; the last is empty without sinks."""
    no_sinks = lse.new_empty(0)
    if q.shape[1] == 0:
        dsinks = no_sinks if sinks is None else torch.zeros_like(sinks)
        return *_empty_grads(q, k, v), dsinks
    rule = Rule(end, position, scale, softcap, window)
    saved = q, k, v, out, lse
    dq, dk, dv, dsinks = _module(implementation, q).backward(dout, saved, sinks, table, rule)
    return dq, dk, dv, no_sinks if dsinks is None else dsinks


def _empty_grads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    H, Hkv = q.shape[0], k.shape[0]
    return _empty(q, H, q.shape[2]), _empty(k, Hkv, k.shape[2]), _empty(v, Hkv, v.shape[2])


@_tree_attention_bwd.register_fake
def _(dout, q, k, v, out, lse, sinks, *_):
    dsinks = lse.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return *_empty_grads(q, k, v), dsinks


def _save(ctx, inputs, output):
    q, k, v, sinks, end, position, table, *options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.options = options
    ctx.save_for_backward(q, k, v, *output, sinks, end, position, table)


def _backward(ctx, dout, _):
    # read once: checkpointing that does not re-enter refuses to unpack a second time
    saved = ctx.saved_tensors
    *grads, dsinks = _tree_attention_bwd(dout, *saved, *ctx.options)
    return *grads, None if saved[5] is None else dsinks, *[None] * 7


_tree_attention.register_autograd(_backward, setup_context=_save)


def tree_attention(
    q: Float[Tensor, "H T K"],
    k: Float[Tensor, "Hkv T K"],
    v: Float[Tensor, "Hkv T Kv"],
    tree: Tree,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " H"] | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Tensor, "H T Kv"]:
    """Softmax attention in which every token of `tree` sees its ancestors and itself.

        z = softcap(scale * q . k),    out = softmax(z, and one more logit `sinks[h]`) v

    Args:
        q: Queries, fp16, bf16, fp32 or fp64; H a multiple of Hkv. Any strides but the last, not
            copied.
        k: Keys, in the dtype of `q`.
        v: Values, in the dtype of `q`; Kv may differ from K.
        tree: The packed row of T tokens, on the device of `q`.
        window: Keys a query sees of its own sequence, itself among them; None for all.
        softcap: The cap c of c tanh(z / c), above 0; None for no cap.
        sinks: One more logit a head, which takes mass and has no value; None for none.
        scale: Of the products; None for K ** -0.5.
        implementation: "cascade" (plain PyTorch, made for CPUs) or "triton"; "auto" is "triton" on
            a GPU and "cascade" elsewhere, or where Triton is missing or an input is fp64.

    Returns:
        In the dtype of `q`; differentiable once in `q`, `k`, `v` and `sinks`. A token's heads lie
        side by side, so that `.transpose(0, 1)` is contiguous. NaN of a token reaches its
        descendants (not those past the window, but for what shares a tile with the window's edge)
        and no other branch.

    Raises:
        ValueError: If a shape, device, stride, number or name is not as above.
        TypeError: If a dtype is not.

    Source:
        The interval mask is FlashMask's, Wang et al. 2024, arXiv:2410.01359.

    Example:
        >>> q = k = torch.zeros(1, 3, 1)
        >>> v = torch.tensor([[[0.0], [2.0], [4.0]]])
        >>> tree = Tree.of(torch.tensor([-1, 0, 0]))  # a prompt of one token, two answers of one
        >>> tree_attention(q, k, v, tree).flatten()
        tensor([0., 1., 2.])
    """
    _check_tensors(q, k, v, tree, sinks)
    scale = _check_numbers(q, window, softcap, scale)
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"`implementation` must be one of {get_args(Implementation)}, got {implementation!r}."
        )
    options = scale, softcap, window, implementation
    out, _ = _tree_attention(q, k, v, sinks, tree.end, tree.position, tree.table, *options)
    return out


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, tree: Tree, sinks: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(
                f"`{name}` must be [heads, tokens, head size], got shape {tuple(x.shape)}; "
                "take the one row of a batch with `[0]`."
            )
        check_dtype(name, x, *FLOATS) if name == "q" else check_dtype(name, x, q.dtype)
        check_device(name, x, q.device, like="q")
        if x.shape[2] < 1 or (x.shape[2] > 1 and x.stride(2) != 1):
            raise ValueError(
                f"`{name}` must have a head size of at least 1, of stride 1, got {x.shape[2]} of "
                f"stride {x.stride(2)}; call `.contiguous()`."
            )
    H, T, K = q.shape
    Hkv = k.shape[0]
    check_shape("k", k, Hkv=Hkv, T=T, K=K)
    check_shape("v", v, Hkv=Hkv, T=T, Kv=v.shape[2])
    if Hkv < 1 or H % Hkv:
        raise ValueError(f"`q` must have a multiple of the Hkv={Hkv} heads of `k`, got {H}.")
    if tree.T != T:
        raise ValueError(f"`tree` must have the T={T} tokens of `q`, got {tree.T}.")
    check_device("tree", tree.end, q.device, like="q")
    if sinks is not None:
        check_dtype("sinks", sinks, *FLOATS)
        check_shape("sinks", sinks, H=H)
        check_device("sinks", sinks, q.device, like="q")


def _check_numbers(
    q: Tensor, window: int | None, softcap: float | None, scale: float | None
) -> float:
    """The scale; raise unless the numbers have a meaning."""
    if window is not None and (isinstance(window, bool) or window < 1):
        raise ValueError(f"`window` must be at least 1, the token itself, got {window}.")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"`softcap` must be finite and above 0, got {softcap}; None is no cap.")
    if scale is None:
        return q.shape[2] ** -0.5
    if not math.isfinite(scale):
        raise ValueError(f"`scale` must be finite, got {scale}.")
    return float(scale)


def tree_attention_reference(
    q: Float[Tensor, "H T K"],
    k: Float[Tensor, "Hkv T K"],
    v: Float[Tensor, "Hkv T Kv"],
    tree: Tree,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " H"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "H T Kv"]:
    """`tree_attention` in plain PyTorch over [H, T, T]: fp64 in gives an fp64 oracle."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
    z = q.to(wide) @ k.mT * (q.shape[2] ** -0.5 if scale is None else scale)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~tree_mask(tree, window), float("-inf"))
    if sinks is not None:
        z = torch.cat([z, sinks.to(wide)[:, None, None].expand(-1, tree.T, 1)], dim=2)
    return (z.softmax(dim=2)[:, :, : tree.T] @ v).to(q.dtype)
