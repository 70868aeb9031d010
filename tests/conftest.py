"""Shared by every test: a fixed seed, one thread, and the devices this machine has."""

import gc

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def frozen_heap():
    """A Trainer collects garbage when it begins; what other tests keep alive need not be walked."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    """Each device in turn; a kernel's route there is PyTorch, the interpreter or the GPU."""
    return request.param
