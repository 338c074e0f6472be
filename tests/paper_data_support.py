"""What the tests of the data of the evaluation share."""

import numpy as np
import pytest

pytest.importorskip("sklearn")


RNG = np.random.default_rng(0)


IMAGES = RNG.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def write(path, content):
    path.write_bytes(content)
    return path
