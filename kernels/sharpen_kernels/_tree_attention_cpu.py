"""Tree attention as a cascade of ordinary attention calls, merged by log-sum-exp.

Forward: each part of the plan gives its own output o_j and log-sum-exp l_j, and

    lse = log(sum_j exp(l_j)),    out = sum_j exp(l_j - lse) o_j

and a sink is one more l_j, with o_j = 0.
Backward enters each part again with the MERGED output and log-sum-exp: with P = exp(S - lse) and
delta = rowsum(dO * O) the parts' gradients are exact and add up.  (Backward through calls that drop
the gradient of l_j is silently wrong.  The trick is ring attention's, Liu et al. 2023,
arXiv:2310.01889.)

A part is a rectangle of queries and keys. Every query has exactly one own part, with keys of its
own run (or of a block of small subtrees), and one cross part for every run above that its window
still reaches. Rectangles are slices of the row: no index, no copy. Leaves of one length are one
batch.

On a CPU the parts are PyTorch's flash attention, elsewhere and under a softcap plain products.
H query heads, Hkv key heads, T tokens, K head size of queries and keys, Kv of values.  Memory is
O(T).  Bits are a function of the whole row's plan; values at rounding level do not depend on it.

In this order: the op's two passes, the products of the parts, their masks, the plan.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._checks import exact_matmul
from .tree import Rule

# both chosen by timing completions of 3 to 100 tokens and tries of 50 answers
SMALL = 128  # tokens of a masked block that subtrees too small for calls of their own share
SHORT = 16  # a leaf from here on has its own call
BAND = 128  # queries of a block along a window's edge; chosen
BLOCK_ELEMENTS = 1 << 20  # logits of a block of the plain products; chosen

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Part(NamedTuple):
    """Queries row ... row + n_rows - 1 on keys col ... col + n_cols - 1, and copies further on.

    Copy i of `n` lies i * `step` rows and i * `col_step` keys behind. Of the rectangle, `kind`
    says what counts: all ("full"), the lower triangle ("causal"), 0 <= delta + i - j < window
    ("band": row i, column j) or what the tree says ("tree").
    """

    row: int
    n_rows: int
    col: int
    n_cols: int
    kind: str
    delta: int = 0
    n: int = 1
    step: int = 0
    col_step: int = 0
    is_own: bool = True


class Plan(NamedTuple):
    """Own parts cover each query once; cross parts are merged into them, in this order."""

    own: tuple[Part, ...]
    cross: tuple[Part, ...]

    @property
    def is_one_call(self) -> bool:
        """Whether one part is the whole row, in order."""
        return len(self.own) == 1 and not self.cross

    @property
    def own_is_square(self) -> bool:
        """Whether each key, too, is in one own part only."""
        return all((p.row, p.n_rows) == (p.col, p.n_cols) for p in self.own)

    @property
    def mixes(self) -> bool:
        """Whether a part holds queries and keys that are nothing to each other."""
        return any(part.kind == "tree" for part in self.own)


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, table: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Output [H, T, Kv] in the dtype of q, log-sum-exp [H, T] in fp32 (fp64); T above 0."""
    with exact_matmul(q.device):
        plan = plan_of(table, rule.window)
        out, lse = _merged(q, k, v, plan, rule)
        if plan.mixes and out.sum().isnan():
            # 0 x NaN: a NaN may come from a neighbour in a block that the query does not see
            out, lse = _merged(q, k, v, plan_of(table, rule.window, small=0), rule)
    if sinks is not None:
        sink = sinks.to(lse.dtype)[:, None]
        out *= torch.sigmoid(lse - sink)[:, :, None]
        lse = torch.logaddexp(lse, sink)
    return _as_new(out, v.shape[2], q.dtype), lse


def backward(
    dout: Tensor, saved: tuple[Tensor, ...], sinks: Tensor | None, table: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sinks; `saved` are q, k, v and the merged output and log-sum-exp."""
    *_, out, lse = saved
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    with exact_matmul(dout.device):
        plan = plan_of(table, rule.window)
        grads = _gradients(dout, saved, plan, rule)
        if plan.mixes and torch.stack([x.sum() for x in grads]).sum().isnan():
            grads = _gradients(dout, saved, plan_of(table, rule.window, small=0), rule)
    dsinks = None
    if sinks is not None:
        delta = (dout.to(lse.dtype) * out).sum(-1)
        dsinks = -(torch.exp(sinks.to(lse.dtype)[:, None] - lse) * delta).sum(-1).to(sinks.dtype)
    dq, dk, dv = (_as_new(g, x.shape[2], x.dtype) for g, x in zip(grads, saved, strict=False))
    return dq, dk, dv, dsinks


def _new(x: Tensor, n_heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """Room for [n_heads, T, width], a token's heads side by side as models want them."""
    return x.new_empty((x.shape[1], n_heads, width), dtype=dtype).transpose(0, 1)


def _as_row(x: Tensor) -> Tensor:
    """Copies [n, H, rows, ...] side by side: [H, n x rows, ...]; of flash's output a view."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)


def _as_new(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The first `width` of every head, laid out as `_new` does."""
    return x[..., :width].to(dtype).transpose(0, 1).contiguous().transpose(0, 1)


def _merged(q: Tensor, k: Tensor, v: Tensor, plan: Plan, rule: Rule) -> tuple[Tensor, Tensor]:
    q_scale, route = _route(q, v, rule)
    wide, masks = torch.promote_types(q.dtype, torch.float32), _Masks(rule, q.dtype)
    q, k, v = (route.padded(x) for x in (q * q_scale, k, v))
    if plan.is_one_call:
        (part,) = plan.own
        inputs = _rows(q, part), _cols(k, part), _cols(v, part)
        part_out, part_lse = route.forward(*inputs, part, masks.of(part))
        return _as_row(part_out), _as_row(part_lse)
    out = _new(q, q.shape[0], v.shape[2], wide)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=wide).T
    for part in (*plan.own, *plan.cross):
        inputs = _rows(q, part), _cols(k, part), _cols(v, part)
        part_out, part_lse = route.forward(*inputs, part, masks.of(part))
        so_far, lse_so_far = _rows(out, part), _rows(lse, part)
        if part.is_own:
            so_far.copy_(part_out)
            lse_so_far.copy_(part_lse)
        else:
            share = torch.sigmoid(part_lse - lse_so_far)
            so_far.lerp_(part_out.to(wide), share[..., None])
            lse_so_far.copy_(torch.logaddexp(lse_so_far, part_lse))
    return out, lse


def _gradients(
    dout: Tensor, saved: tuple[Tensor, ...], plan: Plan, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in fp32 (fp64)."""
    q, k, v, out, lse = saved
    q_scale, route = _route(q, v, rule)
    masks = _Masks(rule, q.dtype)
    q, k, v, out, dout = (route.padded(x) for x in (q * q_scale, k, v, out, dout))

    def of(part: Part) -> tuple[Tensor, Tensor, Tensor]:
        at_rows = [_rows(x, part) for x in (dout, q, out, lse)]
        return route.backward(at_rows, _cols(k, part), _cols(v, part), part, masks.of(part))

    if plan.is_one_call:
        dq, dk, dv = of(plan.own[0])
        return _as_row(dq) * q_scale, _as_row(dk), _as_row(dv)
    dq, dk, dv = (_new(x, x.shape[0], x.shape[2], lse.dtype) for x in (q, k, v))
    if not plan.own_is_square:
        dk.zero_()
        dv.zero_()
    for part in (*plan.own, *plan.cross):
        of_q, *of_keys = of(part)
        rows_of_q = _rows(dq, part)
        if part.is_own:
            rows_of_q.copy_(of_q)
        else:
            rows_of_q.add_(of_q)
        for total, of_part in zip((dk, dv), of_keys, strict=True):
            if part.is_own and plan.own_is_square:
                _cols(total, part).copy_(of_part)
            elif part.n > 1 and part.col_step == 0:
                _cols(total, part._replace(n=1)).add_(of_part.sum(0, keepdim=True))
            else:
                _cols(total, part).add_(of_part)
    return dq.mul_(q_scale), dk, dv


def _route(q: Tensor, v: Tensor, rule: Rule) -> tuple[float, "_Flash | _Plain"]:
    """What scales q, and the products of the parts, which scale by the rest.

    All of the scale goes into q: flash's backward rounds products times scale otherwise than its
    forward, and exp(S - lse) would be wrong by that rounding, at the size of logits.  Half
    precision would round q instead.
    """
    halves = q.dtype in (torch.bfloat16, torch.float16)
    q_scale, scale = (1.0, rule.scale) if halves else (rule.scale, 1.0)
    if q.device.type == "cpu" and rule.softcap is None:
        return q_scale, _Flash(scale, max(q.shape[2], v.shape[2]))
    return q_scale, _Plain(scale, rule.softcap, q.dtype)


class _Flash:
    """Parts by PyTorch's flash attention for CPUs, which wants one head size for all."""

    def __init__(self, scale: float, width: int):
        self.scale, self.width = scale, width

    def padded(self, x: Tensor) -> Tensor:
        """`x` with zeros behind each head: they change no logit and weigh nothing."""
        return pad(x, (0, self.width - x.shape[2])) if x.shape[2] < self.width else x

    def forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part, mask: Tensor | None):
        causal = part.kind == "causal"
        return flash(q, k, v, 0.0, causal, attn_mask=mask, scale=self.scale)

    def backward(
        self, at_rows: list[Tensor], k: Tensor, v: Tensor, part: Part, mask: Tensor | None
    ):
        dout, q, out, lse = at_rows
        tensors = dout, q, k, v, out, lse
        causal = part.kind == "causal"
        return flash_backward(*tensors, 0.0, causal, attn_mask=mask, scale=self.scale)


class _Plain:
    """Parts by matrix products in fp32 (fp64), a block of logits at a time."""

    def __init__(self, scale: float, softcap: float | None, dtype: torch.dtype):
        self.scale, self.softcap = scale, softcap
        self.wide = torch.promote_types(dtype, torch.float32)

    def padded(self, x: Tensor) -> Tensor:
        """`x`: any head sizes do."""
        return x

    def forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part, mask: Tensor | None):
        n, H, size, _ = q.shape
        k, v = k.to(self.wide), v.to(self.wide)
        out = q.new_empty((n, H, size, v.shape[3]), dtype=self.wide)
        lse = q.new_empty((n, size, H), dtype=self.wide).transpose(1, 2)
        for rows, n_cols in self._blocks(part, n * H):
            z, _ = self._logits(q, k, rows, n_cols, part, mask)
            log_mass = z.logsumexp(-1, keepdim=True)
            share = torch.exp(z - log_mass)
            value = share.flatten(2, 3) @ v[:, :, :n_cols]
            out[:, :, rows] = value.view(n, H, -1, v.shape[3])
            lse[:, :, rows] = log_mass.view(n, H, -1)
        return out, lse

    def backward(
        self, at_rows: list[Tensor], k: Tensor, v: Tensor, part: Part, mask: Tensor | None
    ):
        dout, q, out, lse = at_rows
        n, H, _, K = q.shape
        Hkv = k.shape[1]
        k, v = k.to(self.wide), v.to(self.wide)
        dq = torch.empty_like(q, dtype=self.wide)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for rows, n_cols in self._blocks(part, n * H):
            z, slope = self._logits(q, k, rows, n_cols, part, mask)
            dy = dout[:, :, rows].to(self.wide)
            delta = (dy * out[:, :, rows]).sum(-1).view(n, Hkv, -1, 1)
            dy = dy.reshape(n, Hkv, -1, v.shape[3])
            share = torch.exp(z.flatten(2, 3) - lse[:, :, rows].reshape(n, Hkv, -1, 1))
            dz = share * (dy @ v[:, :, :n_cols].mT - delta) * self.scale
            if slope is not None:
                dz *= slope
            dq[:, :, rows] = (dz @ k[:, :, :n_cols]).view(n, H, -1, K)
            dk[:, :, :n_cols] += dz.mT @ self._grouped(q, rows, Hkv)
            dv[:, :, :n_cols] += share.mT @ dy
        return dq, dk, dv

    def _blocks(self, part: Part, n_heads: int) -> Iterator[tuple[slice, int]]:
        """Queries of each block, and the keys that it needs."""
        height = max(1, BLOCK_ELEMENTS // (n_heads * part.n_cols))
        for start in range(0, part.n_rows, height):
            stop = min(start + height, part.n_rows)
            yield slice(start, stop), stop if part.kind == "causal" else part.n_cols

    def _grouped(self, q: Tensor, rows: slice, Hkv: int) -> Tensor:
        """Queries of a block [n, Hkv, rows of all its heads, K]."""
        n, _, _, K = q.shape
        return q[:, :, rows].to(self.wide).reshape(n, Hkv, -1, K)

    def _logits(
        self, q: Tensor, k: Tensor, rows: slice, n_cols: int, part: Part, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [n, Hkv, heads x rows..., n_cols], and the slope of the softcap there."""
        n, Hkv = k.shape[:2]
        z = (self._grouped(q, rows, Hkv) * self.scale) @ k[:, :, :n_cols].mT
        slope = None
        if self.softcap is not None:
            capped = torch.tanh(z / self.softcap)
            z, slope = self.softcap * capped, 1 - capped.square()
        z = z.view(n, Hkv, -1, rows.stop - rows.start, n_cols)
        if part.kind == "causal":
            place = torch.arange(rows.stop, device=z.device)
            z = z.masked_fill(place[rows, None] < place[:n_cols], float("-inf"))
        elif mask is not None:
            z = z + mask[rows, :n_cols]
        return z, slope


class _Masks:
    """Additive masks of the parts of one call; bands of one shape share theirs."""

    def __init__(self, rule: Rule, dtype: torch.dtype):
        self.rule, self.dtype = rule, dtype
        self.bands: dict[tuple[int, int, int], Tensor] = {}

    def of(self, part: Part) -> Tensor | None:
        """Zero where the part's query sees the key, -inf elsewhere; None if `kind` says it all."""
        if part.kind == "tree":
            return self._additive(self._tree(part))
        if part.kind != "band":
            return None
        shape = part.n_rows, part.n_cols, part.delta
        if shape not in self.bands:
            self.bands[shape] = self._additive(self._band(*shape))
        return self.bands[shape]

    def _additive(self, seen: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=self.dtype, device=seen.device)
        return torch.where(seen, zero, float("-inf"))

    def _band(self, n_rows: int, n_cols: int, delta: int) -> Tensor:
        place = torch.arange(max(n_rows, n_cols), device=self.rule.end.device)
        distance = delta + place[:n_rows, None] - place[:n_cols]
        seen = distance >= 0
        return seen if self.rule.window is None else seen & (distance < self.rule.window)

    def _tree(self, part: Part) -> Tensor:
        rows, cols = (
            slice(part.row, part.row + part.n_rows),
            slice(part.col, part.col + part.n_cols),
        )
        place = torch.arange(part.n_rows, device=self.rule.end.device)
        seen = place[:, None] >= place[: part.n_cols] + (part.col - part.row)
        seen &= place[:, None] + part.row < self.rule.end[cols]
        if self.rule.window is not None:
            position = self.rule.position
            seen &= position[rows, None] - position[cols] < self.rule.window
        return seen


def _rows(x: Tensor, part: Part) -> Tensor:
    """The part's queries in x [H, T, ...]: [n, H, n_rows, ...], a view."""
    return _slices(x, part.row, part.n_rows, part.n, part.step)


def _cols(x: Tensor, part: Part) -> Tensor:
    """The part's keys in x [H, T, ...]: [n, H, n_cols, ...], a view; copies may overlap."""
    return _slices(x, part.col, part.n_cols, part.n, part.col_step)


def _slices(x: Tensor, start: int, size: int, n: int, step: int) -> Tensor:
    over_heads, over_rows, *rest = x.stride()
    offset = x.storage_offset() + start * over_rows
    strides = (step * over_rows, over_heads, over_rows, *rest)
    return x.as_strided((n, x.shape[0], size, *x.shape[2:]), strides, offset)


class _Node(NamedTuple):
    """A run, the position of its first token, and the last position of its subtree."""

    start: int
    stop: int
    end: int
    first: int
    last: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def is_leaf(self) -> bool:
        return self.stop == self.end

    def is_small(self, small: int) -> bool:
        """Whether the subtree is too small for calls of its own."""
        return self.end - self.start <= small and not (self.is_leaf and self.length >= SHORT)


def plan_of(table: Tensor, window: int | None, small: int = SMALL) -> Plan:
    """The plan of the runs in `table` [runs, 3]; kept, for the layers that follow ask again.

    Args:
        table: Start, stop and end of every run, on the CPU.
        window: Keys a query sees of its own sequence, itself among them; None for all.
        small: Tokens of a masked block; 0 for no block, and so no part that mixes branches.
    """
    return _plan(tuple(table.flatten().tolist()), window, small)


@functools.lru_cache(maxsize=32)
def _plan(flat: tuple[int, ...], window: int | None, small: int) -> Plan:
    nodes = _nodes(list(zip(flat[::3], flat[1::3], flat[2::3], strict=True)))
    width = nodes[-1].end if window is None else window
    own, alone = _own_parts(nodes, width, small)
    cross = [part for i in alone for part in _cross_parts(nodes, i, width)]
    return Plan(tuple(own), tuple(cross))


def _nodes(runs: list[tuple[int, int, int]]) -> list[_Node]:
    first, last, parent = [0] * len(runs), [0] * len(runs), [-1] * len(runs)
    path: list[int] = []
    for i, (start, stop, _) in enumerate(runs):
        while path and runs[path[-1]][2] <= start:
            path.pop()
        if path:
            parent[i] = path[-1]
            first[i] = last[path[-1]] + 1
        last[i] = first[i] + stop - start - 1
        path.append(i)
    for i in reversed(range(len(runs))):
        if parent[i] >= 0:
            last[parent[i]] = max(last[parent[i]], last[i])
    return [_Node(*runs[i], first[i], last[i]) for i in range(len(runs))]


def _own_parts(nodes: list[_Node], width: int, small: int) -> tuple[list[Part], list[int]]:
    """The own parts, and the nodes whose descendants have not seen them yet."""
    parts: list[Part] = []
    alone: list[int] = []
    i = 0
    while i < len(nodes):
        node, j = nodes[i], _block(nodes, i, small)
        if j > i + 1:
            size = max(x.end for x in nodes[i:j]) - node.start
            parts.append(Part(node.start, size, node.start, size, "tree"))
        else:
            j = i + 1
            while node.is_leaf and j < len(nodes) and _are_twins(node, nodes[j]):
                j += 1
            square = Part(node.start, node.length, node.start, node.length, "band")
            parts.extend(_trim(square._replace(n=j - i, step=node.length), width, node.length))
            if not node.is_leaf:
                alone.append(i)
        i = j
    return parts, alone


def _block(nodes: list[_Node], i: int, small: int) -> int:
    """The node behind the block of small subtrees that starts with node i; i if there is none."""
    j = i
    if nodes[i].is_leaf and i + 1 < len(nodes) and _are_twins(nodes[i], nodes[i + 1]):
        return i  # a batch wastes nothing
    while j < len(nodes) and nodes[j].is_small(small):
        if nodes[j].end - nodes[i].start > small:
            break
        end = nodes[j].end
        while j < len(nodes) and nodes[j].start < end:
            j += 1
    return j


def _are_twins(a: _Node, b: _Node) -> bool:
    return b.is_leaf and (a.length, a.first) == (b.length, b.first)


def _cross_parts(nodes: list[_Node], i: int, width: int) -> Iterator[Part]:
    """Node i's keys, before all that descends from it."""
    above = nodes[i]
    if above.last - above.first < width:
        yield Part(
            above.stop, above.end - above.stop, above.start, above.length, "full", is_own=False
        )
        return
    j = i + 1
    while j < len(nodes) and nodes[j].start < above.end:
        node, n = nodes[j], 1
        while node.is_leaf and j + n < len(nodes) and nodes[j + n].start < above.end:
            if not _are_twins(node, nodes[j + n]):
                break
            n += 1
        part = Part(node.start, node.length, above.start, above.length, "band", is_own=False)
        delta = node.first - above.first
        yield from _trim(part._replace(delta=delta, n=n, step=node.length), width, 0)
        j += n


def _trim(part: Part, width: int, col_step: int) -> Iterator[Part]:
    """A rectangle of two chains without the blocks that the window or the order hides."""
    part = part._replace(col_step=col_step)
    # the last query that still sees the last key
    n_rows = min(part.n_rows, width + part.n_cols - 1 - part.delta)
    if part.delta + part.n_rows - 1 < width:
        yield part._replace(kind="full" if part.delta >= part.n_cols else "causal")
        return
    for row in range(0, n_rows, BAND):
        height = min(BAND, n_rows - row)
        low = max(0, part.delta + row - width + 1)
        high = min(part.n_cols, part.delta + row + height)
        delta = part.delta + row - low
        size = high - low
        sees_all = delta >= size - 1 and delta + height - 1 < width
        yield part._replace(
            row=part.row + row,
            n_rows=height,
            col=part.col + low,
            n_cols=size,
            delta=delta,
            kind="full" if sees_all else "band",
        )
