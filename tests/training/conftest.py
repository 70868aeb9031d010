"""A Trainer collects garbage when it begins; what other tests keep alive need not be walked."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
