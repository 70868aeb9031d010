"""Every kernel compiles for every GPU we name, on a machine that has none."""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sharpen_kernels import _linear_logprob_fused as fused
from sharpen_kernels._launch import INTERPRETED

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="kernels are plain Python under the interpreter"
)

WANT = {"WANT_ENTROPY": True, "WANT_CERTAINTY": True, "WANT_GREEDY": True}
HEAD = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "HAS_TEMPERATURE": True}
TYPES = {"target_ptr": "*i64", "first_ptr": "*i64", "temperature": "fp32", "softcap": "fp32"}
TYPES |= {"greedy_ptr": "*i64", "greedy_part_ptr": "*i64"}
FLOATS = ("hidden_ptr", "weight_ptr", "bias_ptr")
KERNELS = {
    "segment bf16": (fused._segment_kernel, "*bf16", fused.TENSOR_CORES | HEAD | {"WIDEN": False}),
    "segment fp32": (fused._segment_kernel, "*fp32", fused.FP32 | HEAD | {"WIDEN": True}),
    "merge": (fused._merge_kernel, "*fp32", fused.MERGE),
}
# the fp32 segment is the same code on plain cores: once is enough
CASES = [
    (name, sm) for name in KERNELS for sm in (80, 90, 100) if (name, sm) != ("segment fp32", 80)
]


def signature(kernel, floats, constants):
    for name in kernel.arg_names:
        if name in constants:
            yield name, "constexpr"
        elif name in FLOATS:
            yield name, floats
        else:
            yield name, TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a warm cache hides a broken kernel
    kernel, floats, launch = KERNELS[name]
    named = {**launch, **WANT}
    constants = {key: x for key, x in named.items() if key in kernel.arg_names}
    options = {key: x for key, x in launch.items() if key not in constants}
    source = ASTSource(kernel, dict(signature(kernel, floats, constants)), constants)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert binary.asm["cubin"]
