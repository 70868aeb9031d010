"""Every kernel makes a binary for every GPU we name, of the size the checked-in table says."""

import functools
import json

import pytest
import triton

from cubins import AMD, SHARED_LIMIT, TABLE, TARGETS, Binary, build, every_case
from sharpen_kernels._checks import INTERPRETED

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="kernels are plain Python under the interpreter"
)

CASES = {} if INTERPRETED else every_case()
KNOWN = json.loads(TABLE.read_text())


@functools.cache
def binary(case: str, target: str) -> Binary:
    return build(CASES[case], TARGETS[target])


@pytest.mark.parametrize(
    ("case", "target"), [(name, target) for name, case in CASES.items() for target in case.on]
)
def test_nothing_spills_and_all_is_as_measured(case, target):
    found = binary(case, target).resources
    assert (found["stack"], found["local"]) == (0, 0), found
    assert found["shared"] <= SHARED_LIMIT[target], found
    if triton.__version__ == KNOWN["triton"]:
        assert found == KNOWN["cases"][case][target], "python tests/kernels/cubins.py --write"


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.has or case.lacks])
def test_instructions(case):
    for target, pattern in CASES[case].has:
        assert binary(case, target).count(pattern) > 0, f"{target}: no {pattern}"
    for target, pattern in CASES[case].lacks:
        assert binary(case, target).count(pattern) == 0, f"{target}: {pattern}"


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith(("row ", "rank "))])
def test_no_thread_waits_for_another_while_a_row_is_read(case):
    for target in TARGETS:
        over_whole_tiles = binary(case, target).loops()[0]
        assert not over_whole_tiles.keys() & {"BAR", "SHFL", "STS", "STSM", "LDS"}, target


@pytest.mark.parametrize("case", CASES)
def test_makes_an_amd_binary(case):
    assert build(CASES[case], AMD).asm["hsaco"]


def test_the_table_names_these_cases_alone():
    assert list(KNOWN["cases"]) == list(CASES)
