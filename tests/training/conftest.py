"""Trainers begin in every module here."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap(frozen_heap):
    pass
