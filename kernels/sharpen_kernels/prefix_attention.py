"""One decoding step of attention: rows that share a prefix read it together, once.

    z[b, j] = softcap(scale * q[b] . k[j]),    j in the keys of b's prefix, then of its own
    out[b]  = sum_j softmax(z[b], and one more logit sinks)[j] v[j]

The rows of a prefix are the rows of one matrix product with its keys, which are there once: with N
rows a step reads P + N L keys, not N (P + L). Both parts give an output o, their largest logit t
and their mass s = sum_j exp(z_j - t); with t the larger of t_1 and t_2

    s = s_1 exp(t_1 - t) + s_2 exp(t_2 - t)
    out = (s_1 exp(t_1 - t) o_1 + s_2 exp(t_2 - t) o_2) / s

(Juravsky et al. 2024, Hydragen, arXiv:2402.05099, Eq. 3-5, there by log-sum-exps: as large as
logits, these would be rounded as coarsely, and every weight with them.) For inference: no gradient.

B rows, G prefixes, n rows of the largest of them, H query heads, Hkv key heads, head h reads
h // (H / Hkv), P keys of a prefix, L own keys of a row, K head size of queries and keys, Kv of
values. Products in the dtype of the tensors, logits and softmax in fp32 (fp64 for fp64).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ._checks import check_device, check_dtype, check_shape

# numbers in one chain: errors near those of one query alone; shorter ones cost more GEMMs
PIECE = 16


@dataclass(frozen=True, eq=False)
class PrefixRows:
    """Which rows have which prefix.

    Attributes:
        row: The rows of each prefix, row 0 where it has fewer than n.
        place: Where each row stands in `row`, flat.
        is_even: Whether every prefix has n rows, so that `row` is 0, 1, 2, ...
    """

    row: Int64[Tensor, "G n"]
    place: Int64[Tensor, " B"]
    is_even: bool

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device | str = "cpu") -> "PrefixRows":
        """Rows side by side: the first `counts[0]` of prefix 0, then those of prefix 1.

        Raises:
            ValueError: If a count is below 0, or all are 0.

        Example:
            >>> PrefixRows.of([2, 1]).row.tolist()
            [[0, 1], [2, 0]]
        """
        if min(counts, default=0) < 0 or sum(counts) == 0:
            raise ValueError(f"`counts` must be at least 0 with a row in all, got {list(counts)}.")
        n = max(counts)
        row = torch.zeros(len(counts), n, dtype=torch.int64)
        place = torch.zeros(sum(counts), dtype=torch.int64)
        starts = [0, *itertools.accumulate(counts)]
        for g, (start, stop) in enumerate(itertools.pairwise(starts)):
            row[g, : stop - start] = torch.arange(start, stop)
            place[start:stop] = torch.arange(g * n, g * n + stop - start)
        return cls(row.to(device), place.to(device), min(counts) == n)


def prefix_attention(
    q: Float[Tensor, "B H K"],
    prefix_k: Float[Tensor, "G Hkv P K"],
    prefix_v: Float[Tensor, "G Hkv P Kv"],
    own_k: Float[Tensor, "B Hkv L K"],
    own_v: Float[Tensor, "B Hkv L Kv"],
    rows: PrefixRows,
    *,
    softcap: float | None = None,
    sinks: Float[Tensor, " H"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H Kv"]:
    """Attention of one query a row to a prefix that it shares and to keys of its own.

    Args:
        q: One query a row; H a multiple of Hkv.
        prefix_k: Keys of each prefix, once. P may be 0.
        prefix_v: Their values; Kv may differ from K.
        own_k: Keys of each row alone, the query's own among them; L at least 1. Any strides that
            keep a key's numbers side by side; not copied.
        own_v: Their values.
        rows: Which rows have which prefix, on the device of `q`.
        softcap: The cap c of c tanh(z / c), above 0; None for no cap.
        sinks: One more logit a head, which takes mass and has no value; None for none.
        scale: Of the products; None for K ** -0.5.

    Returns:
        In the dtype of `q`.

    Raises:
        ValueError: If a shape, device or number is not as above.
        TypeError: If a dtype is not that of `q`.

    Example:
        >>> q = torch.zeros(2, 1, 1)
        >>> prompt, own = torch.ones(1, 1, 1, 1), torch.tensor([5.0, 9.0]).view(2, 1, 1, 1)
        >>> prefix_attention(q, prompt, prompt, own, own, PrefixRows.of([2])).flatten()
        tensor([3., 5.])
    """
    _check(q, prefix_k, prefix_v, own_k, own_v, rows, sinks)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap` must be above 0 or None, got {softcap}.")
    (B, H, K), Hkv = q.shape, own_k.shape[1]
    of_products = K**-0.5 if scale is None else scale
    own = _part(q.reshape(B, Hkv, -1, K), own_k, own_v, of_products, softcap)
    out_BHK, top_BH, mass_BH = own[0].reshape(B, H, -1), *(x.reshape(B, H) for x in own[1:])
    if prefix_k.shape[2]:
        G, n = rows.row.shape
        at_GnH = q if rows.is_even else q[rows.row.flatten()]
        # the heads of a group and the rows of a prefix are alike to a key
        grouped = at_GnH.reshape(G, n, Hkv, -1, K).transpose(1, 2).flatten(2, 3)
        part = _part(grouped, prefix_k, prefix_v, of_products, softcap)
        part_BHK = _as_rows(part[0], n, rows).reshape(B, H, -1)
        of_prefix = (_as_rows(x[..., None], n, rows).reshape(B, H) for x in part[1:])
        share_BH, top_BH, mass_BH = _joined(top_BH, mass_BH, *of_prefix)
        out_BHK = out_BHK.lerp(part_BHK, share_BH[..., None])
    if sinks is not None:
        sink_BH = sinks.to(top_BH.dtype).expand(B, H)
        share_BH, *_ = _joined(top_BH, mass_BH, sink_BH, torch.ones_like(sink_BH))
        out_BHK = out_BHK * (1 - share_BH)[..., None]
    return out_BHK.to(q.dtype)


def _part(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [..., queries, Kv], largest logit and mass [..., queries] over the keys of a part."""
    z = _products(q, k).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    top = z.amax(-1, keepdim=True)
    e = torch.exp(z - top)
    mass = e.sum(-1, keepdim=True)
    return ((e / mass).to(v.dtype) @ v).to(z.dtype), top[..., 0], mass[..., 0]


def _products(q: Tensor, k: Tensor) -> Tensor:
    """Every query times every key; in fp32 on a CPU in pieces of their numbers.

    A GEMM sums in one chain of rounded steps, which is less accurate than the vector kernel that
    PyTorch takes for one query, and that the tests compare with.
    """
    if q.dtype != torch.float32 or q.device.type != "cpu":
        return q @ k.mT
    first, *others = zip(q.split(PIECE, -1), k.split(PIECE, -1), strict=True)
    z = first[0] @ first[1].mT
    for q_part, k_part in others:
        z = z + q_part @ k_part.mT
    return z


def _joined(
    top: Tensor, mass: Tensor, other_top: Tensor, other_mass: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The other part's share of the mass of both, and largest logit and mass of both."""
    largest = torch.maximum(top, other_top)
    other = other_mass * torch.exp(other_top - largest)
    both = mass * torch.exp(top - largest) + other
    return other / both, largest, both


def _as_rows(x: Tensor, n: int, rows: PrefixRows) -> Tensor:
    """From [G, Hkv, n x heads, ...] to a row of heads for each row."""
    G, Hkv = x.shape[:2]
    flat = x.view(G, Hkv, n, -1, x.shape[-1]).transpose(1, 2).flatten(0, 1)
    return flat if rows.is_even else flat[rows.place]


def _check(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    rows: PrefixRows,
    sinks: Tensor | None,
) -> None:
    B, H, K = q.shape
    (G, Hkv, P, _), L, Kv = prefix_k.shape, own_k.shape[2], own_v.shape[3]
    named = {"prefix_k": prefix_k, "prefix_v": prefix_v, "own_k": own_k, "own_v": own_v}
    for name, x in named.items():
        check_dtype(name, x, q.dtype)
        check_device(name, x, q.device, "q")
    check_shape("prefix_k", prefix_k, G=len(rows.row), Hkv=Hkv, P=P, K=K)
    check_shape("prefix_v", prefix_v, G=G, Hkv=Hkv, P=P, Kv=Kv)
    check_shape("own_k", own_k, B=B, Hkv=Hkv, L=L, K=K)
    check_shape("own_v", own_v, B=B, Hkv=Hkv, L=L, Kv=Kv)
    check_shape("rows.place", rows.place, B=B)
    check_device("rows.place", rows.place, q.device, "q")
    if sinks is not None:
        check_shape("sinks", sinks, H=H)
        check_device("sinks", sinks, q.device, "q")
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"`q` must have a multiple of the {Hkv} heads of `own_k`, got {H}.")
    if L == 0:
        raise ValueError("`own_k` must hold the query's own key, got none.")
