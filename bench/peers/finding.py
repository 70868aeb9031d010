"""Finding the implementations that are compared, and saying why one is not there."""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

# where `make peers` puts them: beside the environment, so that no import of ours finds them
FOLDER = Path(__file__).parents[2] / ".venv" / "peers"

Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Peer:
    """One implementation, ours among them.

    `load` imports it and gives its calls by what they return: "logprob"; "entropy" for
    (logprob, entropy); "statistics" for (logprob, entropy, self-certainty, is_greedy), or as many
    of them as it has. A call takes (hidden, weight, target) or (logits, target).
    """

    name: str
    load: Callable[[], dict[str, Call]]
    devices: tuple[str, ...] = ("cpu", "cuda")  # "interpreter": CUDA kernels, on CPU tensors
    rounds: bool = False  # keeps logits or results in the inputs' dtype: inexact below fp32
    takes_bias: bool = False
    timed: bool = True  # False: another way to call what is timed already
    calls: dict[str, Call] = dataclasses.field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.name.startswith("ours")


Missing = dict[str, str]


def available(peers: Iterable[Peer], device: str) -> tuple[list[Peer], Missing]:
    """The peers that import and run on `device`, loaded; the reason for each other one."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    found, missing = [], {}
    for peer in peers:
        if device not in peer.devices:
            missing[peer.name] = "needs a GPU" if "cuda" in peer.devices else "for CPUs"
            continue
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                found.append(dataclasses.replace(peer, calls=peer.load()))
        # an import of someone else's package can fail in any way
        except Exception as error:
            missing[peer.name] = reason(error)
    return found, missing


def reason(error: BaseException) -> str:
    """Its type and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:100]}"


def without_init(name: str) -> types.ModuleType:
    """Import `name` without the `__init__` of the packages above it, which ask for far more."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        package = ".".join(parts[:i])
        if package in sys.modules:
            continue
        bare = types.ModuleType(package)
        if i == 1:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.submodule_search_locations is None:
                raise ModuleNotFoundError(f"No module named {package!r}")
            bare.__path__ = list(spec.submodule_search_locations)
        else:
            above = sys.modules[".".join(parts[: i - 1])]
            bare.__path__ = [f"{path}/{parts[i - 1]}" for path in above.__path__]
        sys.modules[package] = bare
    return importlib.import_module(name)


def interpret() -> None:
    """Stand-ins for what peers' launchers ask of a GPU, and for what the interpreter lacks."""
    import triton.language as tl

    torch.cuda.device = lambda *_: contextlib.nullcontext()  # pyright: ignore
    torch.cuda.nvtx.range = lambda *_: contextlib.nullcontext()  # pyright: ignore
    torch.Tensor.is_cuda = property(lambda _: True)  # pyright: ignore
    with contextlib.suppress(ImportError):
        utils: Any = importlib.import_module("cut_cross_entropy.tl_utils")
        utils.tl_log1p = lambda x: tl.log(1 + x)
