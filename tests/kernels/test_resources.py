"""Kernels over logits and segments: a cubin for every GPU we name, and nothing spilled in it."""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sharpen_kernels import _segment_reduce_triton as segments
from sharpen_kernels import _token_logprob_triton as logits
from sharpen_kernels._launch import INTERPRETED

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="kernels are plain Python under the interpreter"
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INTS = ("target_ptr", "first_ptr", "top1_ptr", "row_ptr", "rank_ptr")
TYPES = dict.fromkeys(INTS, "*i64") | {"vocab_mask_ptr": "*u8"}
SEGMENT_INTS = ("offsets_ptr", "infinite_ptr", "width_ptr", "argmax_ptr")
TYPES |= dict.fromkeys(SEGMENT_INTS, "*i64") | {"eligible_ptr": "*u8"}
TYPES |= {"running_ptr": "*fp64", "numbers_ptr": "*fp64"}
TYPES |= {"temperature": "fp32", "softcap": "fp32"}
CASES = {
    "row bf16": (logits._row_kernel, "*bf16", logits.FORWARD),
    "row fp32": (logits._row_kernel, "*fp32", logits.FORWARD),
    "rank bf16": (logits._rank_kernel, "*bf16", logits.RANK),
    "grad bf16": (logits._grad_kernel, "*bf16", logits.BACKWARD),
    "grad fp32": (logits._grad_kernel, "*fp32", logits.BACKWARD),
    "sequence": (segments._sequence_kernel, "*fp32", segments.SEQUENCE),
    "window": (segments._window_kernel, "*fp32", segments.WINDOW),
    "group": (segments._group_kernel, "*fp32", segments.GROUP),
}


def signature(kernel, floats, constants):
    for name in kernel.arg_names:
        if name in constants:
            yield name, "constexpr"
        elif name in ("logits_ptr", "dlogits_ptr"):
            yield name, floats
        else:
            yield name, TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(case, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a warm cache hides a broken kernel
    kernel, floats, launch = CASES[case]
    flags = (name for name in kernel.arg_names if name.startswith(("WANT_", "HAS_")))
    constants = dict.fromkeys(flags, True)
    constants |= {name: x for name, x in launch.items() if name in kernel.arg_names}
    options = {name: x for name, x in launch.items() if name not in constants}
    # as a contiguous tensor has it, and as Triton specialises it
    constants |= {name: 1 for name in kernel.arg_names if name == "stride_v"}
    source = ASTSource(kernel, dict(signature(kernel, floats, constants)), constants)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    done = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True
    )
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", done.stdout)
    registers, stack, local = map(int, usage)
    assert (stack, local) == (0, 0), f"{registers} registers"
