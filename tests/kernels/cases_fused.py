"""Kernels of the fused route of `linear_logprob`, each with the tiles of the GPUs it is for."""

import torch

from cubins import Case
from sharpen_kernels import _linear_logprob_triton as fused
from sharpen_kernels import _tiles
from sharpen_kernels._triton_state import wanted_bits
from sharpen_kernels.stats import NAMES, Wanted

TYPES = dict.fromkeys(("target_ptr", "first_ptr"), "*i64") | {"ahead_ptr": "*i32"}
TYPES |= dict.fromkeys(("temperature", "softcap", "order"), "fp32")
EVEN = ("D", "V", "stride_hr", "stride_wv")
BARE = dict.fromkeys(("HAS_BIAS", "HAS_SOFTCAP", "HAS_TEMPERATURE"), False)
EVERY = {"WANT": wanted_bits(Wanted(NAMES).fields), "ONE_PAIR": False}
LOGPROB = BARE | {"WANT": 0, "ONE_PAIR": True}
FOUR = ("logprob", "entropy", "self_certainty", "is_greedy")
GRADS = {"OF_TARGET": True, "OF_ENTROPY": True, "OF_UNIFORM": True, "ONE_PAIR": False}


def case(kernel, sm, dtype, constants, **held) -> Case:
    """`kernel` with the tile of an architecture, loaded as that tile says."""
    tile = _tiles.tile("linear_logprob", sm, dtype, 4096, 128_256)
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    blocks = {"hidden": tile.BLOCK_R, "weight": tile.BLOCK_V}
    types = TYPES | {"dz_ptr": f"*{name}"}
    for operand, rows in blocks.items():
        by_tma = f"tensordesc<{name}[{rows},{tile.BLOCK_D}]>"
        types[operand] = by_tma if tile.tma else f"*{name}"
    fixed = {"TMA": tile.tma, "WIDEN": dtype == torch.float32, "SEGMENT": tile.SEGMENT}
    fixed |= {"stride_hd": 1, "stride_wd": 1}
    if tile.tma and sm == "sm90" and dtype == torch.bfloat16:
        held["has"] = (("sm90", "HGMMA"), ("sm90", "UTMALDG"))
        held["lacks"] = (("sm90", "HMMA"),)
    launch = tile.launch(sums=kernel is fused.segment_kernel)
    return Case(kernel, launch, types, fixed | constants, EVEN, on=(sm,), **held)


CASES = {}
for sm in ("sm80", "sm90", "sm100"):
    half = (sm, torch.bfloat16)
    CASES |= {
        f"segment {sm} bf16, logprob": case(fused.segment_kernel, *half, LOGPROB),
        f"segment {sm} bf16, four": case(
            fused.segment_kernel, *half, LOGPROB | {"WANT": wanted_bits(Wanted(FOUR).fields)}
        ),
        f"segment {sm} bf16, all": case(fused.segment_kernel, *half, EVERY),
        f"linear rank {sm} bf16": case(fused.rank_kernel, *half, {}),
        f"linear logits {sm} bf16": case(fused.logits_kernel, *half, {}),
        f"linear grad {sm} bf16": case(fused.grad_kernel, *half, GRADS),
    }
CASES |= {
    "segment sm90 fp32, all": case(fused.segment_kernel, "sm90", torch.float32, EVERY),
    "linear grad sm90 fp32": case(fused.grad_kernel, "sm90", torch.float32, GRADS),
}
