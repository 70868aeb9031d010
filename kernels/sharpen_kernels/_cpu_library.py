"""The C++ in `cpu/`: compiled once for a machine and a build of torch, kept, loaded on first use.

A build that came with the package is loaded if it is of these sources and this torch; else the
user's cache serves, filled first where it must be. Where nothing can be compiled or the CPU lacks
AVX2, `load` says so once in the log and returns `None`: PyTorch computes the same, more slowly.

In this order: the structures that both ops hand over, the loaded library, the build. `setup.py`
runs this file by its path, so it imports nothing of the package.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = Path(__file__).parent
SOURCES = PACKAGE / "cpu"
# no contraction: a statistic's bits must not depend on what the compiler fuses it with
COMPILE = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-ffp-contract=off", "-DNDEBUG", "-mfma"]
# by torch's word for what the CPU can do
INSTRUCTIONS = {
    "AVX512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ],
    "AVX2": ["-mavx2", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
}
# torch's own OpenMP runtime serves: linking another would start a second pool of threads
LINK = ["-shared", "-ltorch_cpu", "-lc10"]
# `Type` and `Products` of `cpu/linear_logprob.cpp`
TYPES = (torch.bfloat16, torch.float32, torch.float16)
FMA, ONEDNN, AMX = range(3)
TIMEOUT = 600  # seconds a compiler may take

# `RowGrads` of `cpu/logit_gradient.h`
OF_ROW = ("top", "log_mass", "prob", "entropy", "of_entropy", "uniform", "active")
BEST = ("best", "best_column")  # fields of k values a row
COLUMNS = ("column", "best_column")  # int32 in C++

logger = logging.getLogger(__name__)


class Partials(ctypes.Structure):
    """`Partials` of `cpu/row_statistics.h`: addresses of the fields of a `_state.Partial`.

    C++ says spread, square, squares, powers and total for sum_ez, m2, sum_e2, sum_pow and sum_z.
    """

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("top", "mass", "sum_ez", "m2", "sum_e2", "sum_pow")),
        *((name, ctypes.c_void_p) for name in ("sum_z", "n_valid", "column", "second")),
        *((name, ctypes.c_void_p) for name in BEST),
    ]

    @classmethod
    def of(cls, fields: dict[str, Tensor]) -> "Partials":
        """The addresses of these fields; null for the others."""
        return cls(**{name: x.data_ptr() for name, x in fields.items()})


class Inputs(ctypes.Structure):
    """`Inputs` of `cpu/tile.h`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "weight", "bias", "mask")),
        *((name, ctypes.c_void_p) for name in ("target", "first")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "depth")),
        *((name, ctypes.c_int64) for name in ("hidden_stride", "weight_stride")),
        *((name, ctypes.c_float) for name in ("temperature", "softcap")),
    ]


def pointer(x: Tensor | None) -> int | None:
    """Address of the first element; null for None."""
    return None if x is None else x.data_ptr()


def partial_names(fields: frozenset[str]) -> list[str]:
    """The fields of a partial that C++ writes where `fields` are wanted, in its order."""
    return [name for name, *_ in Partials._fields_ if name in {"top", "mass", *fields}]


def empty_field(name: str, n: int) -> Tensor:
    """Memory for `n` values of a field of a partial."""
    return torch.empty(n, dtype=torch.int32 if name in COLUMNS else torch.float32)


def in_torch(written: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """The fields of the partial of every row, from what C++ has written."""
    found = {name: x.long() if name in COLUMNS else x for name, x in written.items()}
    return {name: x.view(-1, k) if name in BEST else x for name, x in found.items()}


class Library:
    """The loaded functions; those that compute raise `RuntimeError` with the C++ message."""

    def __init__(self, path: Path):
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.linear_logprob_error.restype = ctypes.c_char_p
        for name in ("scratch", "row", "backward"):
            getattr(self._library, f"linear_logprob_{name}_bytes").restype = ctypes.c_int64
        self.products = self._library.linear_logprob_products()  # the fastest that run here

    def word_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one element as a factor: what `Word` and `TERMS` of its product make of it."""
        of_amx = {torch.float32: 6, torch.float16: 4, torch.bfloat16: 2}
        return {FMA: 4, ONEDNN: dtype.itemsize, AMX: of_amx[dtype]}[self.products_of(dtype)]

    def products_of(self, dtype: torch.dtype) -> int:
        """The products taken for inputs of this dtype: oneDNN has none of fp16."""
        return FMA if self.products == ONEDNN and dtype == torch.float16 else self.products

    def run(self, name: str, problem: ctypes.Structure, dtype: torch.dtype) -> None:
        """Run a pass: `linear_logprob_forward` and the like."""
        if self._call(name, problem, dtype):
            raise RuntimeError(self._library.linear_logprob_error().decode())

    def n_bytes(self, name: str, problem: ctypes.Structure, dtype: torch.dtype) -> int:
        """Memory that a thread wants for `scratch`, a hidden `row`, or the pass `backward`."""
        return self._call(f"linear_logprob_{name}_bytes", problem, dtype)

    def _call(self, name: str, problem: ctypes.Structure, dtype: torch.dtype) -> int:
        function = getattr(self._library, name)
        return function(
            ctypes.byref(problem),
            ctypes.c_int32(TYPES.index(dtype)),
            ctypes.c_int32(self.products_of(dtype)),
        )


def loaded() -> Library:
    """The library, for who knows that there is one."""
    library = load()
    assert library is not None, "`takes` says whether there is one"
    return library


@functools.cache
def load() -> Library | None:
    """The library, if this CPU has its instructions; compiled if no build is kept yet."""
    if os.environ.get("SHARPEN_CPU_KERNEL") == "0" or instructions() is None:
        logger.info("Tensors on the CPU are scored by PyTorch: no AVX2, or not wanted.")
        return None
    try:
        return _prebuilt() or Library(build())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or ""
        logger.warning(
            "The C++ kernel cannot be built: tensors on the CPU are scored by PyTorch, more "
            "slowly. %s %s",
            error,
            output[-2000:],
        )
        return None


def instructions() -> str | None:
    """Which of INSTRUCTIONS this CPU has, by torch, which ATEN_CPU_CAPABILITY can hold back."""
    capability = torch.backends.cpu.get_cpu_capability()
    return next((name for name in INSTRUCTIONS if capability.startswith(name)), None)


def _prebuilt() -> Library | None:
    """The library that came with the package, if it is of these sources and this torch."""
    path = PACKAGE / f"{_key()}.so"
    if not path.exists():
        return None
    try:
        return Library(path)
    except (OSError, AttributeError) as error:
        logger.warning("%s cannot be loaded, compiling it anew. %s", path, error)
        return None


def build() -> Path:
    """Path of the compiled library, from the cache where it is there; safe among processes."""
    folder = cache_folder()
    path = folder / f"{_key()}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f"{path.stem}.lock"):
        if not path.exists():
            logger.info("Compiling the C++ kernel for the CPU into %s, once.", path)
            begun = time.perf_counter()
            compile_into(folder)
            logger.info("Compiled in %.1f s.", time.perf_counter() - begun)
    return path


def cache_folder() -> Path:
    """Where builds are kept: SHARPEN_CACHE, else `sharpen` in the user's cache folder."""
    if chosen := os.environ.get("SHARPEN_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sharpen"


def _flags() -> list[str]:
    return [*COMPILE, *INSTRUCTIONS[instructions() or "AVX2"]]


def _key() -> str:
    """Of everything the build depends on: sources, flags, torch; the CPU is in the flags."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update(" ".join([*_flags(), *LINK, str(torch.__version__)]).encode())
    return f"cpu-{digest.hexdigest()[:16]}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system drops the lock of a process that dies."""
    with path.open("w") as file:
        # without locks (some network folders) each process compiles, and the last one's stays
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_into(folder: Path) -> Path:
    """Compile the library into a folder that exists.

    Raises:
        FileNotFoundError: If there is no compiler.
        subprocess.SubprocessError: If it fails, or takes more than TIMEOUT.
    """
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"No compiler `{compiler}`; install g++ or set CXX.")
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    # the finished file appears at once, under its final name
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = {f"{scratch}/{source.stem}.o": source for source in SOURCES.glob("*.cpp")}

        def compile_one(out: str) -> None:
            _run(compiler, *_flags(), *include, "-c", str(objects[out]), "-o", out)

        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_one, objects))
        _run(compiler, *objects, f"-L{root / 'lib'}", *LINK, "-o", f"{scratch}/library.so")
        return Path(f"{scratch}/library.so").replace(folder / f"{_key()}.so")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)
