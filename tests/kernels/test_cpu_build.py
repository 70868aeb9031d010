"""How the C++ library is built, with the package or on first use, and kept."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from helpers.oracle import assert_matches_fp64, head_problem, values
from sharpen_kernels import _cpu_library
from sharpen_kernels._checks import INTERPRETED

KERNELS = Path(_cpu_library.__file__).parent.parent
ROOT = KERNELS.parent
LIBRARY = _cpu_library.load()
KEPT = Path() if LIBRARY is None else LIBRARY.path
needs_library = pytest.mark.skipif(
    INTERPRETED or LIBRARY is None,
    reason="the C++ kernel is not used here: no compiler, no AVX2, or Triton's interpreter",
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache on disk and in the process; both as before afterwards."""
    monkeypatch.setenv("SHARPEN_CACHE", str(tmp_path))
    monkeypatch.delenv("SHARPEN_CPU_KERNEL", raising=False)
    _cpu_library.load.cache_clear()
    yield tmp_path
    _cpu_library.load.cache_clear()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_pytorch_scores_and_the_log_says_so_once(
    compiler, fresh, monkeypatch, caplog
):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    problem = head_problem(30, 70, 8)
    assert_matches_fp64(problem)
    values(problem)
    if not INTERPRETED:
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(said) == 1
        assert "scored by PyTorch" in said[0]
    assert not list(fresh.glob("*.so"))


@pytest.mark.parametrize(
    ("capability", "wanted"), [("DEFAULT", "1"), ("AVX2", "0"), ("AVX512", "0")]
)
@pytest.mark.usefixtures("fresh")
def test_another_cpu_or_a_no_compiles_nothing(capability, wanted, monkeypatch):
    monkeypatch.setenv("SHARPEN_CPU_KERNEL", wanted)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(_cpu_library, "build", lambda: pytest.fail("compiled"))
    assert _cpu_library.load() is None


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
    # each source once, and one link
    n_sources = len(list(_cpu_library.SOURCES.glob("*.cpp")))
    assert (tmp_path / "calls").read_text().count("\n") == n_sources + 1
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


@pytest.fixture
def package(fresh, monkeypatch):
    """Where a build that comes with the package lies; empty."""
    folder = fresh / "package"
    folder.mkdir()
    monkeypatch.setattr(_cpu_library, "PACKAGE", folder)
    return folder


@needs_library
def test_a_prebuilt_library_is_loaded_and_no_compiler_runs(package, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    shutil.copy(KEPT, package / KEPT.name)
    assert_matches_fp64(head_problem(30, 70, 8))
    assert _cpu_library.load() is not None
    assert [path.name for path in package.parent.iterdir()] == ["package"]


@needs_library
@pytest.mark.parametrize("broken", ["of another torch", "no library", "of other functions"])
def test_first_use_compiles_where_the_prebuilt_library_does_not_serve(
    broken, package, monkeypatch, caplog
):
    calls = []
    monkeypatch.setattr(_cpu_library, "build", lambda: calls.append(1) or KEPT)
    if broken == "of another torch":
        shutil.copy(KEPT, package / "cpu-0123456789abcdef.so")
    elif broken == "no library":
        (package / KEPT.name).write_text("")
    else:
        (package / "empty.c").write_text("int nothing;")
        empty = [str(package / name) for name in ("empty.c", KEPT.name)]
        subprocess.run(["gcc", "-shared", "-fPIC", empty[0], "-o", empty[1]], check=True)
    assert _cpu_library.load() is not None
    assert calls == [1]
    said = [r.getMessage() for r in caplog.records if "compiling it anew" in r.getMessage()]
    assert len(said) == (broken != "of another torch")


@pytest.fixture
def sources(tmp_path):
    """A copy of what a wheel is built from."""
    folder = tmp_path / "sources"
    skip = shutil.ignore_patterns("__pycache__", "*.so", "base_model")
    for name in ("sharpen", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def wheel(sources, compiler, **environment):
    """The wheel's name, the libraries inside, and what was said of the kernel."""
    script = sources.parent / "compiler"
    script.write_text(f"#!/bin/sh\n{compiler}\n")
    script.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(sources / "dist")],
        cwd=sources,
        env=os.environ | {"CXX": str(script), "SHARPEN_BUILD_CPU": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    (path,) = (sources / "dist").glob("*.whl")
    inside = [name for name in zipfile.ZipFile(path).namelist() if name.endswith((".so", ".lock"))]
    said = [line for line in done.stderr.splitlines() if "CPU kernel" in line]
    return path.name, inside, said


def test_a_wheel_holds_the_library_where_a_compiler_is(sources):
    # writes the file named last, which is what -o names
    name, inside, said = wheel(sources, 'for out in "$@"; do :; done; echo > "$out"')
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    assert inside == [f"sharpen_kernels/{_cpu_library._key()}.so"]
    assert said == []


@pytest.mark.parametrize(
    "environment", [{}, {"SHARPEN_BUILD_CPU": "0"}], ids=["fails", "not wanted"]
)
def test_a_wheel_without_the_library_is_for_any_platform(environment, sources):
    (sources / "build/lib/sharpen_kernels").mkdir(parents=True)
    (sources / "build/lib/sharpen_kernels/cpu-0.so").touch()  # of a build before
    name, inside, said = wheel(sources, "exit 1", **environment)
    assert name.endswith("-py3-none-any.whl")
    assert inside == []
    assert len(said) == (environment == {})
    assert all("compiled on first use instead. CalledProcessError" in line for line in said)
