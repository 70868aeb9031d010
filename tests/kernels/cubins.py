"""Compiles kernels for GPUs that are not there, and reads what came out.

    python tests/kernels/cubins.py --write            # resources.json, anew
    python tests/kernels/cubins.py --sass "row bf16"  # instructions of its loops on sm90

A file cases_*.py beside this one registers kernels: its `CASES` maps a name to a `Case`.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HERE = Path(__file__).parent
TABLE = HERE / "resources.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {f"sm{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100)}
AMD = GPUTarget("hip", "gfx942", 64)
# bytes of shared memory one block may ask for: CUDA C++ Programming Guide, compute capabilities
SHARED_LIMIT = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A kernel as some launch specialises it."""

    kernel: Any
    # constants and options together, as the module's own table has them
    launch: dict[str, Any]
    # Triton's type of an argument, by name; "*fp32" for other pointers, "i32" for other numbers.
    # A descriptor that the host makes is "tensordesc<bf16[128,64]>"; one made in the kernel is a
    # plain pointer
    types: dict[str, str] = dataclasses.field(default_factory=dict)
    # arguments with one value: flags, strides of 1; those the kernel lacks are passed over.
    # WANT_* and HAS_* are True unless given
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)
    # numbers known to be multiples of 16, as Triton finds them at launch; pointers always are
    aligned: tuple[str, ...] = ()
    # (target, pattern of an opcode) pairs: what must be in the SASS, and what must not
    has: tuple[tuple[str, str], ...] = ()
    lacks: tuple[tuple[str, str], ...] = ()
    # the targets that its tile is for
    on: tuple[str, ...] = tuple(TARGETS)

    def type_of(self, name: str) -> str:
        """Triton's type of the argument `name`."""
        return self.types.get(name, "*fp32" if name.endswith("_ptr") else "i32")

    def source(self) -> tuple[ASTSource, dict[str, Any]]:
        """What `triton.compile` takes: the specialised kernel, and the options."""
        names = self.kernel.arg_names
        constants = {name: True for name in names if name.startswith(("WANT_", "HAS_"))}
        constants |= {name: x for name, x in self.launch.items() if name in names}
        constants |= {name: x for name, x in self.constants.items() if name in names}
        signature = {n: "constexpr" if n in constants else self.type_of(n) for n in names}
        pointers = {n for n, kind in signature.items() if kind.startswith("*")}
        attributes = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if n in pointers or n in self.aligned
        }
        options = {name: x for name, x in self.launch.items() if name not in constants}
        return ASTSource(self.kernel, signature, constants, attributes), options


class Instruction(NamedTuple):
    """A line of SASS."""

    address: int
    opcode: str  # with its modifiers: LDG.E.128
    text: str


class Binary:
    """A compiled kernel."""

    def __init__(self, asm: dict[str, Any], shared: int):
        self.asm = asm
        self.shared = shared  # bytes a launch asks for

    def _cuobjdump(self, flag: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(self.asm["cubin"])
            command = [str(CUOBJDUMP), flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @functools.cached_property
    def resources(self) -> dict[str, int]:
        """Registers a thread, bytes of stack and of local memory a thread, of shared a block."""
        said = self._cuobjdump("--dump-resource-usage")
        ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
        return {
            "registers": int(registers),
            "stack": int(stack),
            "local": int(local),
            "shared": self.shared,
        }

    @functools.cached_property
    def sass(self) -> list[Instruction]:
        """Every instruction, in order."""
        line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+ +)?([A-Z][\w.]*)[^;]*);")
        found = line.findall(self._cuobjdump("--dump-sass"))
        return [Instruction(int(at, 16), opcode, text) for at, text, opcode in found]

    def count(self, pattern: str) -> int:
        """How many instructions have an opcode that begins as the regular expression says."""
        return sum(re.match(pattern, each.opcode) is not None for each in self.sass)

    def loops(self) -> list[Counter[str]]:
        """Opcodes of every innermost loop, in the order of the code."""
        spans = []
        for each in self.sass:
            target = re.search(r"\b0x([0-9a-f]+)", each.text)
            if each.opcode.startswith("BRA") and target and int(target[1], 16) < each.address:
                spans.append((int(target[1], 16), each.address))
        inner = [
            (a, b)
            for a, b in spans
            if not any(a <= c and d < b for c, d in spans if (c, d) != (a, b))
        ]
        return [
            Counter(each.opcode.split(".")[0] for each in self.sass if a <= each.address <= b)
            for a, b in inner
        ]


def build(case: Case, target: GPUTarget) -> Binary:
    """Compile `case`; never from a cache, which hides a broken kernel."""
    source, options = case.source()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": folder}),
    ):
        compiled = triton.compile(source, target=target, options=options)
        return Binary(dict(compiled.asm), compiled.metadata.shared)


def every_case() -> dict[str, Case]:
    """The cases of all files cases_*.py, by name."""
    found: dict[str, Case] = {}
    for path in sorted(HERE.glob("cases_*.py")):
        cases = importlib.import_module(path.stem).CASES
        assert not found.keys() & cases.keys(), f"{path.name}: a name is taken"
        found |= cases
    return found


def table(cases: dict[str, Case]) -> str:
    """What resources.json holds: a line a case and target."""
    entries = []
    for name, case in cases.items():
        each = [f'"{sm}": {json.dumps(build(case, TARGETS[sm]).resources)}' for sm in case.on]
        entries.append(f'"{name}": {{\n ' + ",\n ".join(each) + "\n}")
    body = ",\n".join(entries)
    return f'{{"triton": "{triton.__version__}", "cases": {{\n{body}\n}}}}\n'


def main() -> None:
    """Write the table, or show instructions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--sass", metavar="CASE", help="instructions of the loops of a case")
    parser.add_argument("--target", default="sm90", choices=TARGETS)
    asked = parser.parse_args()
    cases = every_case()
    if asked.sass:
        binary = build(cases[asked.sass], TARGETS[asked.target])
        lines = [str(binary.resources)]
        lines += [f"{sum(x.values())} {dict(x.most_common())}" for x in binary.loops()]
        sys.stdout.write("\n".join(lines) + "\n")
    if asked.write:
        TABLE.write_text(table(cases))


if __name__ == "__main__":
    main()
