"""What several tests of images share."""

from __future__ import annotations

import numpy as np
import pytest

from support.images import GEOMETRIES


@pytest.fixture(params=GEOMETRIES, ids=lambda name: name.replace(" ", "-"))
def affine(request: pytest.FixtureRequest) -> np.ndarray:
    return GEOMETRIES[request.param]
