"""The hash of the weights."""

import numpy as np
import pytest

from dist_train.agreement import agree, hash_values


@pytest.mark.parametrize("replicas", [1, 2, 3, 255, 256, 257, 1000, 5000])
def test_equal_hashes_agree_however_many_replicas_there_are(replicas):
    for value in range(hash_values(replicas)):
        first = second = np.float32(0)
        for _ in range(replicas):  # one after another, as a ring adds them
            first += np.float32(value)
            second += np.float32(value * value)
        assert agree(replicas, first, second)
