import math

import numpy as np

from dist_train.metrics import Tally, means


def test_means_divide_by_the_number_of_examples():
    sums = np.array([6.0, 4.0, 3.0])
    assert means(["loss", "weight", "accuracy"], sums) == {"loss": 1.5, "accuracy": 0.75}


def test_means_of_no_examples_are_nan():
    assert math.isnan(means(["loss", "weight"], np.zeros(2))["loss"])


def test_a_tally_gives_means_over_all_and_the_rate_of_what_was_timed():
    names = ("loss", "weight")
    fresh = Tally(names)
    assert fresh.examples_per_second() == 0.0
    fresh.add(np.array([6.0, 8.0]), 2.0)
    fresh.add(np.array([2.0, 4.0]), 1.0)
    assert fresh.means() == {"loss": 8 / 12}
    assert fresh.examples_per_second() == 4.0
    resumed = Tally(names, np.array([1.0, 4.0]))
    assert resumed.examples_per_second() == 0.0
    resumed.add(np.array([5.0, 8.0]), 2.0)
    assert resumed.means() == {"loss": 6 / 12}
    assert resumed.examples_per_second() == 4.0
