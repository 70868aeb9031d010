"""Which tiles of queries and keys meet, and whether each pair in them does.

A tile of keys meets a tile of queries where some subtree that begins in the one reaches into the
other; where all do, and the tile is wholly before them, nothing in it needs a mask.  The lists are
made on the device by one small kernel, one program a tile; the host waits for nothing.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import architecture

SCAN = 64  # tiles that a program looks at together; chosen
LAUNCH: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


class Tiling(NamedTuple):
    """Tile sizes of one kernel and how it is launched; both divide 128."""

    BLOCK_Q: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Lists(NamedTuple):
    """Of each tile, the tiles it meets: `others` [2, tiles, other tiles], `lengths` [2, tiles].

    Plane 0 has those that need no mask, plane 1 the others, both in the order of the row.
    """

    others: Tensor
    lengths: Tensor


Key = tuple[str, str, bool, int]  # kernel, architecture, whether fp32, the larger head size

# written by bench/tune.py: measured on the architecture that the key names
# <table>
TABLE: dict[Key, Tiling] = {}
# </table>

# where nothing was measured: by kernel, whether products are fp32 on plain cores, and the larger
# head size.  Chosen so that forward spills nothing on sm80, sm90 and sm100, and backward little
TILINGS: dict[tuple[str, bool, int], Tiling] = {
    ("fwd", False, 64): Tiling(128, 64, 8, 3),
    ("fwd", False, 128): Tiling(128, 64, 8, 2),
    ("fwd", False, 256): Tiling(64, 64, 8, 2),
    ("fwd", True, 64): Tiling(32, 32, 4, 2),
    ("fwd", True, 128): Tiling(32, 16, 8, 2),
    ("fwd", True, 256): Tiling(16, 32, 8, 1),
    ("dq", False, 64): Tiling(64, 64, 4, 2),
    ("dq", False, 128): Tiling(64, 64, 8, 2),
    ("dq", False, 256): Tiling(32, 32, 8, 1),
    ("dq", True, 64): Tiling(32, 32, 4, 1),
    ("dq", True, 128): Tiling(32, 32, 8, 1),
    ("dq", True, 256): Tiling(16, 16, 8, 1),
    ("dkv", False, 64): Tiling(64, 64, 8, 2),
    ("dkv", False, 128): Tiling(32, 64, 8, 2),
    ("dkv", False, 256): Tiling(32, 32, 8, 1),
    ("dkv", True, 64): Tiling(32, 32, 4, 1),
    ("dkv", True, 128): Tiling(32, 32, 8, 1),
    ("dkv", True, 256): Tiling(16, 16, 8, 1),
}


def padded(size: int) -> int:
    """The head size as a kernel's tile has it: a power of two that a product takes."""
    return max(16, 1 << (size - 1).bit_length())


def tiling_of(kernel: str, q: Tensor, v: Tensor) -> Tiling:
    """The tiling of `kernel` for these head sizes."""
    size = max(64, padded(q.shape[2]), padded(v.shape[2]))
    if size > 256:
        raise ValueError(
            f"`q` and `v` must have head sizes of at most 256, got {q.shape[2]} and "
            f'{v.shape[2]}; use `implementation="cascade"`.'
        )
    is_single = q.dtype == torch.float32
    measured = TABLE.get((kernel, architecture(q.device), is_single, size)) if TABLE else None
    return measured or TILINGS[kernel, is_single, size]


@triton.jit
def _tiles_kernel(
    end_ptr,  # in  [T] int64
    position_ptr,  # in  [T] int64, read if HAS_WINDOW
    others_ptr,  # out [2, n_mine, n_others] int32
    lengths_ptr,  # out [2, n_mine] int32
    T,
    n_others,
    window,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SCAN: tl.constexpr,
):
    mine = tl.program_id(0)
    if OF_QUERIES:
        MINE: tl.constexpr = BLOCK_Q
        OTHER: tl.constexpr = BLOCK_K
    else:
        MINE: tl.constexpr = BLOCK_K
        OTHER: tl.constexpr = BLOCK_Q
    own = mine * MINE + tl.arange(0, MINE)
    own_low = 0
    own_high = 0
    if HAS_WINDOW:
        own_low = tl.min(tl.load(position_ptr + own, mask=own < T, other=9223372036854775807))
        own_high = tl.max(tl.load(position_ptr + own, mask=own < T, other=-1))
    own_end = tl.load(end_ptr + own, mask=own < T, other=0)
    last = tl.max(own_end, axis=0)
    # other=0 past the row: a tile with such columns is never free of a mask
    first = tl.min(own_end, axis=0)
    row_len = tl.num_programs(0).to(tl.int64) * n_others
    others_ptr += mine.to(tl.int64) * n_others
    n_free = 0
    n_masked = 0
    for start in range(0, n_others, SCAN):
        other = start + tl.arange(0, SCAN)
        place = other[:, None] * OTHER + tl.arange(0, OTHER)[None, :]  # [SCAN, OTHER]
        low = 0
        high = 0
        if HAS_WINDOW:
            position = tl.load(position_ptr + place, mask=place < T, other=9223372036854775807)
            low = tl.min(position, axis=1)
            position = tl.load(position_ptr + place, mask=place < T, other=-1)
            high = tl.max(position, axis=1)
        if OF_QUERIES:
            end = tl.load(end_ptr + place, mask=place < T, other=0)
            q0 = mine * BLOCK_Q
            k0 = other * BLOCK_K
            meets = tl.max(end, axis=1) > q0
            free = tl.min(end, axis=1) >= q0 + BLOCK_Q
            meets = meets & (k0 < q0 + BLOCK_Q)
            if HAS_WINDOW:
                meets = meets & (own_low - high < window)
                free = free & (own_high - low < window)
        else:
            q0 = other * BLOCK_Q
            k0 = mine * BLOCK_K
            meets = (last > q0) & (k0 < q0 + BLOCK_Q)
            free = first >= q0 + BLOCK_Q
            if HAS_WINDOW:
                meets = meets & (low - own_high < window)
                free = free & (high - own_low < window)
        meets = meets & (other < n_others)
        free = meets & free & (k0 + BLOCK_K - 1 <= q0)
        masked = (meets & ~free).to(tl.int32)
        free = free.to(tl.int32)
        at = n_free + tl.cumsum(free, axis=0) - 1
        tl.store(others_ptr + at, other, mask=free != 0)
        at = n_masked + tl.cumsum(masked, axis=0) - 1
        tl.store(others_ptr + row_len + at, other, mask=masked != 0)
        n_free += tl.sum(free, axis=0)
        n_masked += tl.sum(masked, axis=0)
    tl.store(lengths_ptr + mine, n_free)
    tl.store(lengths_ptr + tl.num_programs(0) + mine, n_masked)


def lists_of(
    end: Tensor, position: Tensor, window: int | None, tiling: Tiling, of_queries: bool
) -> Lists:
    """Tiles of keys that each tile of queries meets, or of queries that each tile of keys does."""
    T = end.shape[0]
    mine, other = tiling.BLOCK_Q, tiling.BLOCK_K
    mine, other = (mine, other) if of_queries else (other, mine)
    n_mine, n_others = -(-T // mine), -(-T // other)
    others = torch.empty((2, n_mine, n_others), dtype=torch.int32, device=end.device)
    lengths = torch.empty((2, n_mine), dtype=torch.int32, device=end.device)
    flags: dict[str, Any] = {"OF_QUERIES": of_queries, "HAS_WINDOW": window is not None}
    flags |= {"BLOCK_Q": tiling.BLOCK_Q, "BLOCK_K": tiling.BLOCK_K, "SCAN": SCAN}
    with torch.cuda.device_of(end):  # Triton launches on the current device, not the tensor's
        _tiles_kernel[(n_mine,)](
            end, position, others, lengths, T, n_others, window or 0, **flags, **LAUNCH
        )
    return Lists(others, lengths)
