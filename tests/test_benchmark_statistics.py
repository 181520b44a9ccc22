"""Aggregates over seeds and environments, against numbers by hand and rliable's own."""

import numpy as np
from rliable.metrics import probability_of_improvement

from modip_sb3.benchmark import statistics
from modip_sb3.benchmark.tables import what_seeds_allow


def test_interquartile_means() -> None:
    scores = np.array([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0], [100.0, -50.0]])
    estimate = statistics.interquartile_means({"a": scores})["a"]
    assert estimate.value == np.mean([1, 2, 10, 11])  # of eight runs the two best and the two worst do not count
    assert estimate.low < estimate.value < estimate.high
    assert statistics.interquartile_means({"a": scores})["a"] == estimate  # the same resamples each time
    one = statistics.interquartile_means({"a": scores[:1, :1]})["a"]
    assert one == (0.0, 0.0, 0.0)


def test_bootstrap_leaves_the_random_numbers_alone() -> None:
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    statistics.means({"a": np.arange(6.0).reshape(3, 2)})
    assert np.random.rand() == expected


def test_probability_of_improvement() -> None:
    scores = {"base": np.array([[1.0], [2.0]]), "a": np.array([[1.5], [3.0]]), "b": np.array([[0.0], [0.5]])}
    found = statistics.probabilities_of_improvement(scores, "base")
    assert {name: estimate.value for name, estimate in found.items()} == {"a": 0.75, "b": 0.0}
    assert found["b"] == (0.0, 0.0, 0.0) and found["a"][1:] == (0.0, 1.0)
    rliable_point = probability_of_improvement(scores["a"], scores["base"])
    assert found["a"].value == rliable_point


def test_performance_profiles() -> None:
    profiles = statistics.performance_profiles({"a": np.array([[1.0], [2.0], [3.0]])}, np.array([0.0, 1.5, 2.5, 3.0]))
    np.testing.assert_allclose(profiles["a"].value, [1, 2 / 3, 1 / 3, 0])


def test_what_is_said_of_few_seeds() -> None:
    assert "has 10 distinct resamples" in what_seeds_allow(3) and "the IQM is their mean" in what_seeds_allow(3)
    assert "the IQM is their mean" not in what_seeds_allow(5) and "no interval" in what_seeds_allow(1)
    assert what_seeds_allow(10) == "Intervals: stratified bootstrap over 10 seeds."
