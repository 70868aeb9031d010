"""The kernels of tree attention: cubins for every GPU we name; forward spills nothing."""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sharpen_kernels import _tree_attention_triton as fused
from sharpen_kernels._checks import INTERPRETED
from sharpen_kernels._tiles import TILINGS

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="kernels are plain Python under the interpreter"
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INTS = dict.fromkeys(("end_ptr", "position_ptr"), "*i64")
INTS |= dict.fromkeys(("others_ptr", "lengths_ptr"), "*i32")
WIDE = ("lse_ptr", "state_ptr", "sinks_ptr")
KERNELS = {
    "fwd": (fused._fwd_kernel, None),
    "dq": (fused._dq_kernel, None),
    "dkv": (fused._dkv_kernel, None),
    "delta": (fused._delta_kernel, {"ROWS": fused.ROWS} | fused.LAUNCH),
    "tiles": (fused._tiles_kernel, {"BLOCK_Q": 128, "BLOCK_K": 64, "SCAN": fused.SCAN}),
}
# head sizes of small and of large models; fp32 is the same code on plain cores: once is enough
CASES = [(name, 128, "*bf16", sm) for name in KERNELS for sm in (80, 90, 100)]
CASES += [("fwd", 64, "*bf16", sm) for sm in (80, 90, 100)]
CASES += [("fwd", 256, "*bf16", 90), ("fwd", 64, "*fp32", 90), ("dkv", 64, "*fp32", 100)]


def signature(kernel, floats, constants):
    for name in kernel.arg_names:
        if name in constants:
            yield name, "constexpr"
        elif name in INTS:
            yield name, INTS[name]
        elif name.endswith("_ptr"):
            yield name, "*fp32" if name in WIDE else floats
        else:
            yield name, "fp32" if name in ("scale", "softcap") else "i32"


@pytest.mark.parametrize(("name", "size", "floats", "capability"), CASES)
def test_compiles(name, size, floats, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a warm cache hides a broken kernel
    kernel, launch = KERNELS[name]
    if launch is None:
        launch = TILINGS[name, floats == "*fp32", size]._asdict()
    flags = {flag: True for flag in kernel.arg_names if flag.startswith(("HAS_", "OF_"))}
    widths = dict.fromkeys(("K", "KV", "BLOCK_D", "BLOCK_DV"), size)
    named = {**widths, **flags, **launch, "PRECISION": "ieee"}
    constants = {key: x for key, x in named.items() if key in kernel.arg_names}
    # contiguous heads of such sizes are aligned, which Triton finds out at a launch
    aligned = ("_ptr", "_qh", "_qt", "_kh", "_kt", "_vh", "_vt", "_oh", "_ot", "_dh", "_dt")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, key in enumerate(kernel.arg_names)
        if key.endswith(aligned)
    }
    types = dict(signature(kernel, floats, constants))
    source = ASTSource(kernel, types, constants, attributes)
    options = {key: x for key, x in launch.items() if key not in constants}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    # what a block of threads may have, in bytes
    assert binary.metadata.shared <= {80: 163, 90: 227, 100: 227}[capability] * 1024
    if name == "fwd":
        done = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        )
        (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", done.stdout)
        registers, stack, local = map(int, usage)
        assert (stack, local) == (0, 0), f"{registers} registers"
