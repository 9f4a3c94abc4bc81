"""Spectra with exact answers: r^D, a binary and a ternary ultrametric tree, a binomial cascade."""

import numpy as np
import pytest

from l2e.analysis.multifractal import MOMENTS, kept_counts, share_spectrum, spectrum, tally

ZERO = int(np.flatnonzero(MOMENTS == 0)[0])


def tree_distances(multiplicities, depth):
    """Distances 2^(depth - common prefix + 1) between the leaves of a self-similar tree.

    multiplicities: of each child, how many copies; a node's copies are all distinct leaves.
    """
    branches = [(child, copy) for child, m in enumerate(multiplicities) for copy in range(m)]
    children = np.array([child for child, _ in branches])
    index = np.indices((len(branches),) * depth).reshape(depth, -1).T
    path = children[index]
    same = np.cumprod(path[:, None, :] == path[None, :, :], axis=2).sum(axis=2)
    return 2.0 ** (depth - same + 1)


def spectrum_of(distances, threshold):
    distances = distances.copy()
    np.fill_diagonal(distances, np.inf)
    return spectrum(kept_counts(distances, threshold))


def test_moment_zero_and_the_top_of_the_spectrum_are_exact():
    random = np.random.default_rng(0)
    found = spectrum(kept_counts(1 / np.abs(random.normal(size=(60, 100)) * 0.05), 150))
    assert found.tau[ZERO] == pytest.approx(0, abs=1e-12)
    assert found.f.max() == pytest.approx(0, abs=1e-12)
    assert np.isnan(found.fit[ZERO])
    assert np.nanmax(found.fit) <= 1


@pytest.mark.parametrize("dimension", [0.5, 1, 2])
def test_a_power_law_has_one_exponent(dimension):
    radii = np.arange(1, 101)
    found = share_spectrum((radii / 100.0) ** dimension, 5.0 * np.eye(100), radii)
    np.testing.assert_allclose(found.tau, dimension * MOMENTS, atol=1e-12)
    assert found.alpha_0 == pytest.approx(dimension)
    assert found.width == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(found.fit[MOMENTS != 0], 1)


@pytest.mark.parametrize(("branching", "depth"), [(2, 6), (3, 6)])
def test_an_ultrametric_tree_has_the_dimension_of_its_branching(branching, depth):
    size = branching**depth
    distances = np.full((size, size), 2.0)
    leaves = np.arange(size)
    for level in range(1, depth + 1):
        apart = leaves[:, None] // branching**level != leaves[None, :] // branching**level
        distances[apart] = 2.0 ** (level + 1)
    # A leaf reaches b^level leaves, itself included, within 2^level.
    found = spectrum_of(distances, 150)
    assert found.alpha_0 == pytest.approx(np.log2(branching), abs=1e-9)
    assert found.width == pytest.approx(0, abs=1e-9)
    assert found.nodes == size


def test_a_binomial_cascade_has_its_analytic_spectrum():
    distances = tree_distances((1, 2), depth=6)
    assert len(distances) == 3**6
    # The twin leaves of a doubled child share their whole path: distance 2, as d = 2^(6 - 6 + 1).
    found = spectrum_of(distances, 150)
    p = 1 / 3
    tau = -np.log2(p ** (MOMENTS + 1) + (1 - p) ** (MOMENTS + 1))
    np.testing.assert_allclose(found.tau, tau, atol=1e-9)
    assert found.alpha_0 == pytest.approx(0.926056, abs=1e-6)
    assert found.width == pytest.approx(0.733596, abs=1e-6)


def test_shares_are_counted_node_by_node():
    random = np.random.default_rng(1)
    mass = 1 + np.cumsum(random.integers(3, size=(40, 12)), axis=1)
    share, often = tally(mass)
    assert len(set(share)) <= len(share) < mass.size
    for column in range(12):
        counted = np.repeat(share, often[column].astype(int))
        np.testing.assert_array_equal(np.sort(counted), np.sort(mass[:, column] / mass[:, -1]))


def slow_spectrum(distances, threshold):
    """The published steps with plain loops over nodes, radii and moments."""
    kept = [[d for d in row if 1 < d <= threshold] for row in distances]
    kept = [np.rint(row) for row in kept if len(row) > 10]
    radii = sorted({r for row in kept for r in row})
    tau = []
    for q in MOMENTS:
        logs = []
        for r in radii:
            z = 0.0
            for row in kept:
                z += ((1 + sum(d <= r for d in row)) / (1 + len(row))) ** q
            logs.append(np.log(z))
        tau.append(np.polyfit(np.log(np.array(radii) / radii[-1]), logs, 1)[0])
    return np.array(tau), len(kept)


def test_spectrum_equals_plain_loops():
    random = np.random.default_rng(3)
    distances = 1 / np.abs(random.normal(size=(30, 40)) * 0.03)
    tau, nodes = slow_spectrum(distances, 60)
    found = spectrum(kept_counts(distances, 60))
    np.testing.assert_allclose(found.tau, tau, atol=1e-9)
    assert found.nodes == nodes
    assert nodes > 0


def test_a_node_counts_only_with_more_than_ten_neighbours():
    distances = np.full((2, 30), np.inf)
    distances[0, :11] = np.arange(2, 13)
    distances[1, :10] = np.arange(2, 12)
    assert spectrum(kept_counts(distances, 150)).nodes == 1


def test_no_kept_node_is_a_clear_error():
    with pytest.raises(ValueError, match="threshold"):
        spectrum(kept_counts(np.full((5, 40), 500.0), 150))
    with pytest.raises(ValueError, match="no slope"):
        spectrum(kept_counts(np.full((5, 40), 7.0), 150))
