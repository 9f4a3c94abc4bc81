"""Multifractal spectrum of a network of weighted edges (NeuroMFA, Section 3).

From each node's distances to its neighbours to the mass exponents tau(q), the spectrum f(alpha),
and its two numbers: alpha_0 (irregularity) and w (heterogeneity).
"""

from dataclasses import dataclass

import numpy as np

MOMENT_STEP = 0.1
MOMENTS = np.round(np.arange(-30, 31) * MOMENT_STEP, 10)
MIN_KEPT = 10


@dataclass(frozen=True)
class Spectrum:
    """tau: [moments]; alpha and f: [moments - 1]; fit: R^2 of tau(q)'s regressions, [moments],
    NaN at q = 0, where ln Z is constant. nodes: how many nodes counted."""

    tau: np.ndarray
    alpha: np.ndarray
    f: np.ndarray
    fit: np.ndarray
    nodes: int

    @property
    def alpha_0(self) -> float:
        """alpha where f is largest: the first, since f(-0.1) and f(0) are equal by construction."""
        return float(self.alpha[np.argmax(self.f >= self.f.max() - 1e-9)])

    @property
    def width(self) -> float:
        return float(self.alpha.max() - self.alpha.min())


def kept_counts(distances: np.ndarray, threshold: int) -> np.ndarray:
    """How many neighbours lie at each rounded distance, int64 [nodes, threshold + 1].

    distances: [nodes, neighbours], inf where there is no edge. Kept are 1 < d <= threshold.
    """
    nodes, _ = distances.shape
    kept = (distances > 1) & (distances <= threshold)
    rounded = np.rint(distances[kept]).astype(np.int64)
    node = np.broadcast_to(np.arange(nodes)[:, None], distances.shape)[kept]
    flat = np.bincount(node * (threshold + 1) + rounded, minlength=nodes * (threshold + 1))
    return flat.reshape(nodes, threshold + 1)


def spectrum(counts: np.ndarray) -> Spectrum:
    """The multifractal spectrum of nodes with `counts` neighbours at each distance.

    counts: [nodes, distances], column r holding distance r (column 0 is empty). Raises ValueError
    if no node has more than 10 kept neighbours, or if they all lie at one distance.
    """
    counts = counts[counts.sum(axis=1) > MIN_KEPT]
    if not len(counts):
        raise ValueError(
            f"no node has more than {MIN_KEPT} kept distances; raise the threshold T or the "
            "sample size, or check the weights' scale (a distance is 1/|w|)"
        )
    radii = np.flatnonzero(counts.any(axis=0))
    if len(radii) < 2:
        raise ValueError(f"all kept distances round to {radii[0]}: no slope can be fitted")
    share, often = tally(1 + np.cumsum(counts, axis=1)[:, radii])
    return share_spectrum(share, often, radii)


def share_spectrum(share: np.ndarray, often: np.ndarray, radii: np.ndarray) -> Spectrum:
    """The spectrum of nodes of which `often` [radii, shares] have each `share` [shares] within r.

    radii: ascending, [radii]; within the last of them every node has its whole mass, share 1.
    """
    # Z_q(r) = sum over nodes of p_i(r)^q: each distinct p is raised to each power once.
    partition = (often @ _powers(share)).T
    tau, fit = _slopes(np.log(radii / radii[-1]), np.log(partition))
    alpha = np.diff(tau) / np.diff(MOMENTS)
    f = MOMENTS[:-1] * alpha - tau[:-1]
    return Spectrum(tau, alpha, f, fit, nodes=round(often[-1].sum()))


def _powers(share: np.ndarray) -> np.ndarray:
    """share^q for every moment, [shares, moments]: whole powers of share^0.1 and its inverse."""
    step, half = share**MOMENT_STEP, len(MOMENTS) // 2 + 1
    up, down = (np.vander(base, half, increasing=True) for base in (step, 1 / step))
    return np.hstack([down[:, :0:-1], up])


def tally(mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct shares p_i(r) = mass_i(r) / mass_i(r_max), and how many nodes have each at r.

    mass: whole numbers [nodes, radii]. They are small, so few of the shares differ. Returns float64
    [shares] and [radii, shares].
    """
    totals, which = np.unique(mass[:, -1], return_inverse=True)
    size = totals[-1] + 1
    pair = (which[:, None] * size + mass).T  # numbers (total, mass) as one, [radii, nodes]
    seen = np.zeros(len(totals) * size, dtype=bool)
    seen[pair] = True
    pairs = np.flatnonzero(seen)
    place = np.cumsum(seen) - 1
    often = np.empty((len(pair), len(pairs)))
    for row, nodes in zip(often, pair, strict=True):
        row[:] = np.bincount(place[nodes], minlength=len(pairs))
    of, share = np.divmod(pairs, size)
    return share / totals[of], often


def _slopes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ordinary least squares of each row of y [rows, points] on x [points]: slopes and R^2."""
    x = x - x.mean()
    y = y - y.mean(axis=1, keepdims=True)
    slope = y @ x / (x @ x)
    total = (y**2).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        fit = np.where(total > 1e-20 * y.shape[1], slope**2 * (x @ x) / total, np.nan)
    return slope, fit
