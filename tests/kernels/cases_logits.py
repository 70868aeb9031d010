"""Kernels over logits, to be compiled."""

from cubins import Case
from sharpen_kernels import _token_logprob_triton as logits
from sharpen_kernels import _triton_state as state
from sharpen_kernels.stats import NAMES, Wanted

INTS = ("target_ptr", "first_ptr", "row_ptr", "run_ptr")
NUMBERS = ("softcap", "inverse_softcap", "inverse_temperature", "temperature_by_softcap", "order")
TYPES = dict.fromkeys(INTS, "*i64") | dict.fromkeys(NUMBERS, "fp32")
TYPES |= {"vocab_mask_ptr": "*u8", "ahead_ptr": "*i32"}
HALF = TYPES | dict.fromkeys(("logits_ptr", "dlogits_ptr", "bias_ptr"), "*bf16")
# contiguous rows, as Triton specialises them
ALIGNED = {"stride_v": 1, "stride_b": 1, "IS_ALIGNED": True}
# as most calls have it: no option, a vocabulary and rows that are multiples of 16
BARE = ALIGNED | dict.fromkeys(("HAS_BIAS", "HAS_MASK", "HAS_SOFTCAP", "HAS_TEMPERATURE"), False)
EVEN = ("V", "stride_r", "width")
WIDE_LOADS = tuple((sm, r"LDG\.E\.128") for sm in ("sm80", "sm90", "sm100"))


def wants(*names: str) -> dict[str, int]:
    return {"WANT": state.wanted_bits(Wanted(names).fields)}


def row(constants, *names, types=HALF, vector=8, aligned=(), **held) -> Case:
    constants = constants | wants(*names) | {"VECTOR": vector}
    return Case(logits._row_kernel, logits.FORWARD, types, constants, aligned, **held)


CASES = {
    "row bf16, logprob": row(BARE, "logprob", aligned=EVEN, has=WIDE_LOADS),
    "row bf16, four": row(
        BARE, "logprob", "entropy", "self_certainty", "is_greedy", aligned=EVEN, has=WIDE_LOADS
    ),
    "row bf16, odd vocabulary, aligned rows": row(BARE, "logprob", has=WIDE_LOADS),
    "row bf16, unaligned": row(BARE | {"IS_ALIGNED": False}, "logprob"),
    "row bf16, all": row(ALIGNED, *NAMES),
    "row fp32, logprob": row(BARE, "logprob", types=TYPES, vector=4, has=WIDE_LOADS),
    "row fp32, all": row(ALIGNED, *NAMES, types=TYPES, vector=4),
    "merge": Case(state.merge_kernel, logits.MERGE, TYPES, wants(*NAMES)),
    "chosen bf16": Case(logits._chosen_kernel, logits.CHOSEN, HALF, ALIGNED),
    "rank bf16": Case(logits._rank_kernel, logits.RANK, HALF, BARE | {"VECTOR": 8}, has=WIDE_LOADS),
    "rank fp32, all": Case(
        logits._rank_kernel, logits.RANK, TYPES, ALIGNED | {"VECTOR": 4}, has=WIDE_LOADS
    ),
    "maxima bf16": Case(
        logits._maxima_kernel, logits.MAXIMA, HALF, BARE | {"VECTOR": 8, "RUN": 32}, has=WIDE_LOADS
    ),
    "candidates bf16": Case(
        logits._candidates_kernel, logits.CANDIDATES, HALF, ALIGNED | {"RUN": 32, "BLOCK_K": 32}
    ),
    "grad bf16": Case(
        logits._grad_kernel, logits.BACKWARD, HALF, BARE | {"VECTOR": 8}, EVEN, has=WIDE_LOADS
    ),
    "grad fp32, all": Case(
        logits._grad_kernel, logits.BACKWARD, TYPES, ALIGNED | {"VECTOR": 4}, EVEN
    ),
}
