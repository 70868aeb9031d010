"""For kernels alone: poisoned memory, silent IEEE specials, many small segments."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

import helpers.interpreter_dots as interpreter_dots
from sharpen_kernels._checks import INTERPRETED

if INTERPRETED:
    interpreter_dots.install()

# torch lists its constructors once: a poisoned one in that list would make `with torch.device(...)`
# blind to the true one, for every later test of the process
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Fresh float memory is NaN, so an output element no kernel wrote cannot pass."""
    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        fresh = getattr(owner, name)

        def poisoned(*args, _fresh=fresh, **kwargs):
            out = _fresh(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture(autouse=True)
def _ieee_specials_are_no_warning():
    """Triton's interpreter computes in NumPy, which warns of log(0); a GPU does not."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        yield


@pytest.fixture
def small_segments(monkeypatch):
    """Segments of 64 columns (PyTorch, C++) and 128 (Triton): many to merge, at little cost."""
    from sharpen_kernels import _linear_logprob_cpu as native
    from sharpen_kernels import _linear_logprob_torch as blocked
    from sharpen_kernels import _tiles

    monkeypatch.setattr(blocked, "SEGMENT_ELEMENTS", 1)
    monkeypatch.setattr(native, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(native, "PARTIALS_BYTES", 1)  # passes of one block of rows
    monkeypatch.setattr(native, "MAX_WAVE", 64)
    monkeypatch.setattr(native, "MAX_PASS", 64)
    tile = _tiles.tile
    cut = {"SEGMENT": 128, "BLOCK_V": 128}
    monkeypatch.setattr(_tiles, "tile", lambda *a: dataclasses.replace(tile(*a), **cut))


@pytest.fixture
def small_tiles(monkeypatch):
    """Segments of 64 columns (PyTorch, C++), of 256 in tiles of 64 or 128 (Triton), of logits."""
    from sharpen_kernels import _token_logprob_cpu as native
    from sharpen_kernels import _token_logprob_torch as blocked
    from sharpen_kernels import _token_logprob_triton as fused

    monkeypatch.setattr(native, "SEGMENT", 64)
    monkeypatch.setattr(native, "PARTIALS_BYTES", 1)  # passes of one row
    monkeypatch.setattr(blocked, "SEGMENT", 64)
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 256)
    monkeypatch.setattr(blocked, "CUDA_BLOCK_ELEMENTS", 256)
    monkeypatch.setattr(fused, "BLOCK_ELEMENTS", 200)  # two rows for k = 3
    for launch in (fused.FORWARD, fused.RANK):
        monkeypatch.setitem(launch, "LANES", 8)
        monkeypatch.setitem(launch, "UNROLL", 2)
        monkeypatch.setitem(launch, "SEGMENT", 256)
    for launch in (fused.BACKWARD, fused.MAXIMA):
        monkeypatch.setitem(launch, "BLOCK_V", 128)
