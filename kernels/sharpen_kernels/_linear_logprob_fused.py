"""The fused Triton route of `linear_logprob`: logits live as tiles in fp32 on the chip.

Forward is one persistent kernel and a merge: a unit of work is a block of rows and a fixed
segment of the vocabulary. `ranks`, the best columns and `backward` compute tiles again, of the
same bits. Which shape a tile has is in `_tiles`, never by R; there are no atomics: a row scores
the same bits in any batch and with any subset of statistics.

No call waits for the device, with `rows` or without, so all of this captures in a CUDA graph.
Workspace: at most 256 MiB, whatever R and V, beside a copy of the bias in fp32 and, backward, the
gradient of hidden in fp32.

R hidden rows, S (row, target) pairs, V vocabulary, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _tiles
from ._fused_backward import COEFFICIENTS, grad_kernel
from ._fused_forward import segment_kernel
from ._fused_passes import logits_kernel, rank_kernel
from ._fused_state import FIELDS, merge_kernel, wanted_bits
from ._launch import INTERPRETED
from ._linear_logprob_chunk import Head, RowGrads
from ._pairs import Pairs
from ._rows import Partial, largest, merge
from .stats import Wanted

PARTIALS_BYTES = 64 * 2**20  # states of the segments of one pass of rows
PASS_BYTES = 64 * 2**20  # counts, or copies of hidden rows, of one pass
BEST_BYTES = 32 * 2**20  # logits of one pass: sorting them takes six times as much
GRADIENT_BYTES = 96 * 2**20  # gradients of logits; as much again for a wave of the weight's own
MERGE: dict[str, Any] = {"BLOCK_R": 128, "num_warps": 4, "enable_fp_fusion": False}


def _tile(hidden: Tensor, head: Head) -> _tiles.Tile:
    """The table's entry for these tensors, for fp32 where they multiply in fp32."""
    weight = head.weight
    dtype = weight.dtype if hidden.dtype == weight.dtype else torch.float32
    arch = _tiles.architecture(hidden.device)
    return _tiles.tile("linear_logprob", arch, dtype, hidden.shape[1], head.vocab_size)


def takes(hidden: Tensor, head: Head) -> bool:
    """Whether the table gives this route what the kernels can compute."""
    return _tile(hidden, head).route == "fused"


class _Call:
    """What the launches of one call share: the tile, the head, and how tiles are loaded."""

    def __init__(self, hidden: Tensor, head: Head):
        self.head, self.V, self.D = head, head.vocab_size, hidden.shape[1]
        weight = head.weight
        half = hidden.dtype == weight.dtype != torch.float32
        self.dtype = weight.dtype if half else torch.float32
        self.tile = _tile(hidden, head)
        self.n_segments = -(-self.V // self.tile.SEGMENT)
        self.bias = self._bias()
        self.flags: dict[str, Any] = {
            "HAS_BIAS": self.bias is not None,
            "HAS_SOFTCAP": head.softcap is not None,
            "HAS_TEMPERATURE": head.temperature != 1.0,
            "WIDEN": INTERPRETED or not half,
        }

    def _bias(self) -> Tensor | None:
        """The bias in fp32, -inf in masked columns; None where there is neither."""
        bias, mask, V = self.head.bias, self.head.vocab_mask, self.V
        if bias is not None:
            bias = bias[:V].float().contiguous()
            if self.head.softcap is not None:
                # a bias of -inf is capped, not masked
                bias = bias.clamp(min=torch.finfo(torch.float32).min)
        if mask is None:
            return bias
        wide = mask.new_zeros(V, dtype=torch.float32) if bias is None else bias
        return torch.where(mask[:V], wide, float("-inf"))

    def arguments(
        self, hidden: Tensor, *, sums: bool = False
    ) -> tuple[list[Any], list[Any], dict[str, Any]]:
        """Hidden rows, weight and bias; sizes, strides and options; flags and tile."""
        tile, weight = self.tile, self.head.weight[: self.V]
        tma = tile.tma and self.D > 0 and _by_tma(hidden) and _by_tma(weight)
        operands: list[Any] = [hidden, weight]
        if tma:
            from triton.tools.tensor_descriptor import TensorDescriptor

            blocks = ([tile.BLOCK_R, tile.BLOCK_D], [tile.BLOCK_V, tile.BLOCK_D])
            operands = [
                TensorDescriptor(x, list(x.shape), list(x.stride()), block)
                for x, block in zip(operands, blocks, strict=True)
            ]
        operands.append(weight if self.bias is None else self.bias)
        sizes = [hidden.shape[0], self.V, self.D, *hidden.stride(), *weight.stride()]
        options = [self.head.temperature, self.head.softcap or 0.0]
        return operands, [*sizes, *options], {**self.flags, "TMA": tma, **tile.launch(sums=sums)}

    def blocks(self, R: int) -> int:
        """How many blocks R rows are."""
        return _parts(R, self.tile.BLOCK_R)

    @property
    def group(self) -> int:
        """Rows that run side by side: the fewest worth a pass."""
        return self.tile.BLOCK_R * self.tile.GROUP_R

    def rows_in(self, budget: int, bytes_a_row: int) -> int:
        """Rows of a pass that may take `budget` bytes: whole groups, one at least."""
        return max(budget // max(bytes_a_row, 1) // self.group, 1) * self.group


def _by_tma(x: Tensor) -> bool:
    """Whether the copy engine can read `x`: 16-byte addresses, neighbouring columns."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    # an expanded row has stride 0, which the engine takes for a tensor of one row
    return aligned and x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def _parts(n: int, size: int) -> int:
    """How many pieces of `size` cover n."""
    return -(-n // size)


def _launch(x: Tensor, kernel: Any, programs: int, *arguments: Any, **flags: Any) -> None:
    with torch.cuda.device_of(x):  # Triton launches on the current device, not the tensor's
        kernel[(programs,)](*arguments, **flags)


def _passes(R: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, R)) for start in range(0, R, step)]


def _programs(call: _Call, units: int, device: torch.device) -> int:
    """Programs of a persistent kernel; the result does not depend on their number."""
    if device.type != "cuda":
        return min(units, 4)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(units, processors * call.tile.per_sm)


def forward(hidden: Tensor, head: Head, pairs: Pairs, wanted: Wanted) -> tuple[Partial, Tensor]:
    """The partial of every row, and the logit of every pair's target (NaN outside the vocabulary).

    Wants R > 0.
    """
    R = hidden.shape[0]
    call = _Call(hidden, head)
    chosen = hidden.new_full(pairs.target.shape, float("nan"), dtype=torch.float32)
    out = hidden.new_empty((len(FIELDS), R), dtype=torch.float32)
    want = wanted_bits(wanted.fields)
    for rows in _passes(R, call.rows_in(PARTIALS_BYTES, 4 * len(FIELDS) * call.n_segments)):
        x = hidden[rows]
        n = x.shape[0]
        part = hidden.new_empty((len(FIELDS), call.n_segments, n), dtype=torch.float32)
        operands, options, flags = call.arguments(x, sums=True)
        one = pairs.order is None
        of_pass = rows if one else slice(None)
        units = call.blocks(n) * call.n_segments
        _launch(
            hidden, segment_kernel, _programs(call, units, hidden.device),
            *operands, pairs.target[of_pass], pairs.first[rows.start :], chosen[of_pass],
            part, *options, wanted.renyi_order,
            WANT=want, ONE_PAIR=one, SEGMENT=call.tile.SEGMENT, **flags,
        )  # fmt: skip
        merges = _parts(n, MERGE["BLOCK_R"])
        _launch(
            hidden, merge_kernel, merges,
            part, out[:, rows], n, call.n_segments, R, wanted.renyi_order, WANT=want, **MERGE
        )  # fmt: skip
    found = {name: x for name, x in zip(FIELDS, out, strict=True) if name in wanted.fields}
    if "column" in found:
        found["column"] = found["column"].view(torch.int32).long()
    part = Partial(out[0], out[1], **found)
    if "best" in wanted.fields:
        best, column = _best(call, hidden, wanted.k)
        part = part._replace(best=best, best_column=column)
    return part, chosen


def _best(call: _Call, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and their columns, from logits written wave by wave."""
    wave = call.tile.SEGMENT
    found = []
    for rows in _passes(hidden.shape[0], call.rows_in(BEST_BYTES, 4 * wave)):
        x = hidden[rows]
        operands, options, flags = call.arguments(x)
        part: Partial | None = None
        for start in range(0, call.V, wave):
            stop = min(start + wave, call.V)
            z = x.new_empty((x.shape[0], stop - start), dtype=torch.float32)
            tiles = _parts(stop - start, call.tile.BLOCK_V)
            _launch(
                x, logits_kernel, call.blocks(x.shape[0]) * tiles,
                *operands, z, start, stop, *options, **flags,
            )  # fmt: skip
            best, at = largest(z, k)
            unused = best[:, 0]
            right = Partial(unused, unused, best=best, best_column=at + start)
            part = right if part is None else merge(part, right)
        assert part is not None
        found.append((part.best, part.best_column))
    best, column = zip(*found, strict=True)
    return torch.cat(best), torch.cat(column)


def ranks(hidden: Tensor, head: Head, pairs: Pairs, chosen: Tensor) -> Tensor:
    """Unmasked columns ahead of each pair's target [S] int64; any number for a pair outside.

    `chosen` [S] are the targets' logits, from the `forward` above: these are the same bits.
    """
    call = _Call(hidden, head)
    tiles = _parts(call.V, call.tile.BLOCK_V)
    S = chosen.shape[0]
    ahead = torch.empty_like(pairs.target)
    bytes_a_row = max(4 * tiles, hidden.element_size() * call.D)
    for span in _passes(S, call.rows_in(PASS_BYTES, bytes_a_row)):
        # a row for each pair: one logit to rank against
        one = pairs.order is None
        x = hidden[span] if one else hidden[pairs.row[span].clamp(0, hidden.shape[0] - 1)]
        n = x.shape[0]
        counts = torch.empty((tiles, n), dtype=torch.int32, device=x.device)
        operands, options, flags = call.arguments(x)
        _launch(
            hidden, rank_kernel, call.blocks(n) * tiles,
            *operands, pairs.target[span], chosen[span], counts, *options, **flags,
        )  # fmt: skip
        ahead[span] = counts.sum(dim=0)
    return ahead


def backward(
    grads: dict[str, Tensor],
    state: Tensor,
    hidden: Tensor,
    head: Head,
    pairs: Pairs,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, those that `needs` names; logits are recomputed.

    `grads` [S] and `pairs` are in the order of the pairs, and 0 where a pair does not count;
    `state` [4, R] is (top, log_mass, entropy, n_valid). A wave of columns at a time, gradients of
    logits are written for a pass of rows and multiplied by the vendor's GEMM: in bf16 for bf16
    inputs, in fp32 for all others. dX and dW add up in fp32, in one order, and are rounded once;
    what is rounded to bf16 before that makes their rms error 1.4 times, and their largest at most
    twice, that of an fp32 gradient rounded to bf16 (emulated on a CPU: 512 rows, V = 8192).
    """
    call = _Call(hidden, head)
    R, D = hidden.shape
    need_hidden, need_weight, need_bias = needs
    # bf16 alone: gradients below 6e-8 would be 0 in fp16
    narrow = torch.bfloat16 if call.dtype == torch.bfloat16 and not INTERPRETED else torch.float32
    dhidden = hidden.new_zeros((R, D), dtype=torch.float32) if need_hidden else None
    dweight = torch.zeros_like(head.weight) if need_weight else None
    dbias = torch.zeros_like(head.bias) if need_bias and head.bias is not None else None
    of_row = RowGrads(grads, state, pairs.row, R)
    coef = _coefficients(of_row)
    own = grads.get("logprob")
    one = pairs.order is None
    # its row of dW and, where that is widened, of W; or a group of rows of dz
    column_bytes = max(4 * D * (1 if narrow == torch.bfloat16 else 2), narrow.itemsize * call.group)
    unit = call.tile.BLOCK_V
    wave = max(GRADIENT_BYTES // column_bytes // unit, 1) * unit
    wave = min(wave, _parts(call.V, unit) * unit)
    step = call.rows_in(GRADIENT_BYTES, narrow.itemsize * wave)
    step = min(step, call.rows_in(PASS_BYTES, narrow.itemsize * max(D, 1)))
    for start in range(0, call.V, wave):
        stop = min(start + wave, call.V)
        weight = head.weight[start:stop].to(narrow)
        dweight_v = weight.new_zeros(weight.shape, dtype=torch.float32) if need_weight else None
        dbias_v = None if dbias is None else torch.zeros_like(coef[0, :1]).expand(stop - start)
        for rows in _passes(R, step):
            x = hidden[rows]
            n = x.shape[0]
            dz = x.new_empty((n, stop - start), dtype=narrow)
            sums = coef.new_empty((call.blocks(n) if dbias is not None else 0, stop - start))
            operands, options, flags = call.arguments(x)
            of_pass = rows if one else slice(None)
            grad = coef if own is None else own[of_pass]
            tiles = _parts(stop - start, call.tile.BLOCK_V)
            _launch(
                hidden, grad_kernel, call.blocks(n) * tiles,
                *operands, pairs.target[of_pass], pairs.first[rows.start :], grad,
                coef[:, rows], dz, sums, R, start, stop, *options,
                OF_TARGET=own is not None, OF_ENTROPY=of_row.of_entropy is not None,
                OF_UNIFORM=of_row.uniform is not None, WANT_BIAS=dbias is not None,
                ONE_PAIR=one, **flags,
            )  # fmt: skip
            if dhidden is not None:
                _add_product(dhidden[rows], dz, weight)
            if dweight_v is not None:
                # 0 times what a row without gradient holds is 0 only if that is finite
                used = torch.where(of_row.active[rows], x, 0.0).to(narrow)
                _add_product(dweight_v, dz.T, used)
            if dbias_v is not None:
                dbias_v = dbias_v + sums.sum(dim=0)
        if dweight is not None and dweight_v is not None:
            dweight[start:stop] = dweight_v
        if dbias is not None and dbias_v is not None:
            dbias[start:stop] = dbias_v
    return dhidden, dweight, dbias


def _coefficients(of_row: RowGrads) -> Tensor:
    """The rows of COEFFICIENTS and of 1 / mass [8, R]; 0 where a call has none."""
    zero = torch.zeros_like(of_row.top)
    named = [getattr(of_row, name) for name in COEFFICIENTS]
    rows = [zero if x is None else x.to(zero.dtype) for x in named]
    rows.append(of_row.log_mass.double().neg().exp().to(zero.dtype))
    return torch.cat(rows, dim=1).T.contiguous()


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out += a b`, in fp32 whatever the dtype of the factors."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
