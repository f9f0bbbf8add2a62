"""The implementations that run on CPU, each suite over all of them."""

import pytest

import pallas_kernels
from pallas_kernels import Ops


@pytest.fixture(params=pallas_kernels.available("cpu"))
def ops(request: pytest.FixtureRequest) -> Ops:
    return pallas_kernels.resolve(request.param)
