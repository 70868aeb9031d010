"""The C++ route: which tensors take it, its bits, and how its library is built and kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oracle import assert_matches_fp64, head_problem, values, values_and_gradients
from sharpen_kernels import _cpu_library, linear_logprob
from sharpen_kernels import _linear_logprob_chunk as chunked
from sharpen_kernels import _linear_logprob_cpu as native
from sharpen_kernels._launch import INTERPRETED

needs_library = pytest.mark.skipif(
    INTERPRETED or _cpu_library.load() is None,
    reason="the C++ kernel is not used here: no compiler, no AVX-512, or Triton's interpreter",
)
DTYPES = [torch.float32, torch.bfloat16]
KERNELS = Path(_cpu_library.__file__).parent.parent


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache on disk and in the process; both as before afterwards."""
    monkeypatch.setenv("SHARPEN_CACHE", str(tmp_path))
    monkeypatch.delenv("SHARPEN_CPU_KERNEL", raising=False)
    _cpu_library.load.cache_clear()
    yield tmp_path
    _cpu_library.load.cache_clear()


def same(got, want):
    return all(torch.equal(x, want[name]) for name, x in got.items())


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_torch_on_a_large_vocabulary(dtype):
    assert_matches_fp64(head_problem(70, 20_000, 48, dtype=dtype, bias=True))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# several chunks of the depth, ragged ones, several blocks of the depth
@pytest.mark.parametrize("D", [600, 257, 1057])
def test_waves_passes_and_chunks(dtype, D, small_segments):
    assert_matches_fp64(head_problem(140, 200, D, dtype=dtype, bias=True), softcap=8.0)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [15, 300, 1100])
def test_same_bits_with_any_number_of_threads(dtype, D):
    problem = head_problem(150, 1500, D, dtype=dtype, bias=True)
    want = values_and_gradients(linear_logprob, problem)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            assert same(values_and_gradients(linear_logprob, problem), want)
        finally:
            torch.set_num_threads(1)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_certain_row_has_a_clean_gradient(dtype):
    # p of the target is all but 1: the gradient is 1 - p, which only the same logits can give
    problem = head_problem(64, 300, 32, dtype=dtype)
    problem["weight"][:64] = 3 * problem["hidden"]
    problem["target"] = torch.arange(64)
    got = assert_matches_fp64(problem, stats=("logprob",))
    certain = got["logprob"] == 0
    assert certain.sum() > 20
    assert got["dhidden"][certain].abs().max() < 1e-5


@needs_library
@pytest.mark.parametrize("large", ["hidden", "weight"])
def test_bf16_gradient_that_cancels(large):
    # 300 terms of 64 / 300 against one of -64: p rounded to bf16 would leave 0.1 of what is 0
    problem = head_problem(300, 300, 8, dtype=torch.bfloat16)
    problem["hidden"][:] = problem["weight"][:] = 0
    problem[large][:] = 64
    problem["target"] = torch.arange(300)
    leaf = problem["weight" if large == "hidden" else "hidden"].requires_grad_()
    linear_logprob(**problem).logprob.sum().backward()
    assert leaf.grad.abs().max() < 2e-3


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_from_strided_rows(dtype):
    problem = head_problem(70, 300, 40, dtype=dtype)
    want = values(problem)
    for name in ("hidden", "weight"):
        x = problem[name]
        wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)
        assert same(values(problem | {name: wide[:, :40]}), want)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["PARTIALS_BYTES", "MIN_CHUNK"])
def test_same_bits_in_any_passes_and_chunks_of_rows(dtype, name, monkeypatch):
    problem = head_problem(300, 700, 40, dtype=dtype)
    want = values(problem)
    monkeypatch.setattr(native, name, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert same(values(problem), want)


@needs_library
def test_takes_what_it_multiplies_as_it_is(monkeypatch):
    x, w = torch.zeros(3, 8), torch.zeros(9, 8)

    def takes(x, w):
        return native.takes(x, chunked.Head(w, None, 1.0, None, 9))

    assert takes(x, w)
    assert takes(x.bfloat16(), w.bfloat16())
    assert takes(x[:, :4], w[::2, :4])
    assert not takes(x.half(), w.half())
    assert not takes(x.double(), w.double())
    assert not takes(x.bfloat16(), w)
    assert not takes(x, torch.zeros(8, 9).T)
    assert not takes(torch.zeros(8, 3).T, w)
    assert not takes(x[:, :0], w[:, :0])
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not takes(x, w)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_pytorch_scores_and_the_log_says_so_once(
    compiler, fresh, monkeypatch, caplog
):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    problem = head_problem(3, 70, 8)
    assert_matches_fp64(problem)
    values(problem)
    if not INTERPRETED:
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(said) == 1
        assert "scored by PyTorch" in said[0]
    assert not list(fresh.glob("*.so"))


@pytest.mark.parametrize(("capability", "wanted"), [("AVX2", "1"), ("AVX512", "0")])
@pytest.mark.usefixtures("fresh")
def test_another_cpu_or_a_no_compiles_nothing(capability, wanted, monkeypatch):
    monkeypatch.setenv("SHARPEN_CPU_KERNEL", wanted)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(_cpu_library, "build", lambda: pytest.fail("compiled"))
    assert _cpu_library.load() is None


@needs_library
@pytest.mark.usefixtures("fresh")
def test_a_cpu_without_the_micro_kernels_is_told_and_scored_by_pytorch(monkeypatch, caplog):
    caplog.set_level("INFO", logger="sharpen_kernels")
    monkeypatch.setattr(_cpu_library.Library, "could_run", lambda self: False)
    problem = head_problem(3, 70, 8)
    assert_matches_fp64(problem)
    values(problem)
    said = [r.getMessage() for r in caplog.records if "scored by PyTorch" in r.getMessage()]
    assert len(said) == 1


def python(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(KERNELS), **environment},
        text=True,
        stdout=subprocess.PIPE,
    )


@needs_library
def test_processes_that_start_together_compile_once(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho >> {tmp_path}/calls\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "SHARPEN_CACHE": str(tmp_path / "cache")}
    code = "from sharpen_kernels import _cpu_library as c; print(c.load() is not None)"
    running = [python(code, **environment) for _ in range(2)]
    assert [process.communicate()[0] for process in running] == ["True\n"] * 2
    assert (tmp_path / "calls").read_text().count("\n") == 2  # one to compile, one to link
    kept = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert kept == [".lock", ".so"]


def test_import_loads_nothing():
    code = "import sharpen_kernels._cpu_library as c; print(c.load.cache_info().currsize)"
    assert python(code).communicate()[0] == "0\n"


@needs_library
def test_another_source_is_another_build(monkeypatch, tmp_path):
    before = _cpu_library._key()
    (tmp_path / "other.cpp").write_text("int x;")
    monkeypatch.setattr(_cpu_library, "SOURCES", tmp_path)
    assert _cpu_library._key() != before
