"""Kernels of `segment_reduce`, to be compiled."""

from cubins import Case
from sharpen_kernels import _segment_reduce_triton as segments

INTS = ("offsets_ptr", "infinite_ptr", "width_ptr", "argmax_ptr")
TYPES = dict.fromkeys(INTS, "*i64") | {"eligible_ptr": "*u8"}
TYPES |= dict.fromkeys(("running_ptr", "numbers_ptr"), "*fp64")
CASES = {
    "sequence": Case(segments._sequence_kernel, segments.SEQUENCE, TYPES),
    "window": Case(segments._window_kernel, segments.WINDOW, TYPES),
    "group": Case(segments._group_kernel, segments.GROUP, TYPES),
}
