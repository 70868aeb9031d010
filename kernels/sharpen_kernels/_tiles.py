"""Which route and which tile compute an op: two checked-in tables, written by `bench/tune.py`.

Of `linear_logprob` by architecture, dtype, and classes of D and V, never by the number of rows: a
row takes one route and one order of sums in any batch. Choosing at run time by a stopwatch would
not. Of the kernels of `tree_attention` by architecture, whether fp32, and head size.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import INTERPRETED


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the kernels of one op are launched; all but the route means the fused one.

    A unit of work is BLOCK_R rows and SEGMENT columns, walked in tiles of BLOCK_V columns and
    BLOCK_D of the hidden size; a tile leaves the accumulators in PIECES runs of columns.
    """

    route: str = "fused"  # "fused", or "chunk": the vendor's product, then statistics of it
    BLOCK_R: int = 64
    BLOCK_V: int = 64
    BLOCK_D: int = 32
    PIECES: int = 1
    PASS_PIECES: int = 1  # of second passes and gradients, which keep no sums
    SEGMENT: int = 4096
    GROUP_R: int = 16  # blocks of rows side by side, which share a segment of the weight in L2
    num_warps: int = 4
    num_stages: int = 2
    per_sm: int = 1  # programs a multiprocessor holds
    tma: bool = False  # where strides and addresses allow, else pointers: the same bits

    def launch(self, *, sums: bool) -> dict[str, int | bool]:
        """Keyword arguments of every kernel of a tile; `sums` of the one that keeps sums.

        fp fusion is off, and spelled out: Triton 3.10 changes its default, and with it the last
        bits of a score.
        """
        names = ("GROUP_R", "BLOCK_R", "BLOCK_V", "BLOCK_D", "PIECES", "num_warps", "num_stages")
        found = {name: getattr(self, name) for name in names}
        pieces = {} if sums else {"PIECES": self.PASS_PIECES}
        return found | pieces | {"enable_fp_fusion": False}


Key = tuple[str, str, str, str, str]  # op, architecture, dtype, class of D, class of V

# written by bench/tune.py: measured on the architecture that the key names
# <table of linear_logprob>
TABLE: dict[Key, Tile] = {}
# </table of linear_logprob>

# chosen, not measured: the largest tiles that spill no register with every statistic on
HALF = {
    "sm80": Tile(BLOCK_R=128, BLOCK_V=64, BLOCK_D=64, num_warps=8, num_stages=3, per_sm=2),
    "sm90": Tile(
        BLOCK_R=128,
        BLOCK_V=128,
        BLOCK_D=64,
        PIECES=2,
        PASS_PIECES=2,
        num_warps=8,
        num_stages=4,
        tma=True,
    ),
    "sm100": Tile(
        BLOCK_R=128,
        BLOCK_V=128,
        BLOCK_D=64,
        PIECES=4,
        PASS_PIECES=4,
        num_warps=8,
        num_stages=3,
        tma=True,
    ),
}
SINGLE = Tile(PIECES=2)
INTERPRETER = Tile(BLOCK_R=128, BLOCK_V=512, BLOCK_D=16, PIECES=2, PASS_PIECES=2, tma=True)


def d_class(D: int) -> str:
    """The class of a hidden size: how long a product hides a tile's statistics."""
    return "narrow" if D <= 1024 else "middle" if D <= 2560 else "wide"


def v_class(V: int) -> str:
    """The class of a vocabulary: whether few or many segments fill the machine."""
    return "small" if V <= 65_536 else "large"


def architecture(device: torch.device) -> str:
    """The name of an architecture in the table: smXY, or AMD's own name."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def tile(op: str, arch: str, dtype: torch.dtype, D: int, V: int) -> Tile:
    """The tile of `op` for inputs of `dtype`; fp32 stands for mixed inputs too."""
    if arch == "interpreter":
        return INTERPRETER
    name = str(dtype).removeprefix("torch.")
    measured = TABLE.get((op, arch, name, d_class(D), v_class(V)))
    if measured is not None:
        return measured
    if dtype == torch.float32:
        return SINGLE
    # an architecture without a tile of its own takes that of a kin: sm120 has the matrix
    # instructions and the shared memory of sm80's, not of sm100's
    if arch in ("sm100", "sm101", "sm103", "sm110"):
        return HALF["sm100"]
    return HALF["sm90"] if arch == "sm90" else HALF["sm80"]


class Tiling(NamedTuple):
    """Tile sizes of one kernel of `tree_attention` and how it is launched; both divide 128."""

    BLOCK_Q: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


TilingKey = tuple[str, str, bool, int]  # kernel, architecture, whether fp32, the larger head size

# written by bench/tune.py: measured on the architecture that the key names
# <table of tree_attention>
TILING_TABLE: dict[TilingKey, Tiling] = {}
# </table of tree_attention>

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
    measured = (
        TILING_TABLE.get((kernel, architecture(q.device), is_single, size))
        if TILING_TABLE
        else None
    )
    return measured or TILINGS[kernel, is_single, size]
