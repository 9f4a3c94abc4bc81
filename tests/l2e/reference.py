"""The method written out plainly in float64 NumPy, for one process; no class of the project."""

import math

import numpy as np


def gelu(x):
    erf = np.vectorize(math.erf)
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_slope(x):
    erf = np.vectorize(math.erf)
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + erf(x / math.sqrt(2))) + x * density


class Reference:
    """One layer's statistics, threshold and loss over a sequence of global batches [b, N]."""

    def __init__(
        self,
        *,
        late_start,
        forget,
        k=0.02,
        eps=0.01,
        weight=0.0003,
        inhibited_layers=1,
        rate=0.5,
        floor=0.02,
        scale_invariant=False,
        gradient_ratio=None,
    ):
        self.late_start, self.forget, self.k, self.eps = late_start, forget, k, eps
        self.weight, self.inhibited_layers = weight, inhibited_layers
        self.gradient_ratio, self.compared = gradient_ratio, 0
        self.lm_gradient = self.ms_gradient = 0.0  # of the mean over a batch, not of a sample
        self.rate, self.floor, self.scale_invariant = rate, floor, scale_invariant
        self.start = max(late_start, 2)
        self.steps = self.m = self.updates = 0
        self.mean = self.var = self.share = self.tau = None
        self.drift = 0.0

    def phi(self, z):
        return (z - self.mean) ** 2 / (self.var + self.eps * self.var.mean())

    def selected(self, z):
        if self.tau is None:
            return np.zeros(z.shape, dtype=bool)
        return self.phi(z) >= self.tau

    def factor(self, b, n):
        return self.weight / (self.inhibited_layers * self.k * n * b)

    def loss(self, z):
        chosen, (b, n) = self.selected(z), z.shape
        if not chosen.any():
            return 0.0
        square = (z - self.mean) ** 2
        if self.scale_invariant:
            square = square / self.var
        return self.factor(b, n) * np.log(square[chosen]).sum()

    def loss_slope(self, z):
        """dL_MS/dz, by the formulas."""
        chosen, (b, n) = self.selected(z), z.shape
        if self.tau is None:
            return np.zeros_like(z)
        slope = np.where(chosen, 2 / (z - self.mean), 0)
        if self.scale_invariant:
            slope = slope - 2 * self.share * (z - self.mean) / self.var
        return self.factor(b, n) * slope

    def compare(self, z, gradient):
        """Before `step`: the weight from here on, by the gradient [b, N] that arrived at z."""
        arrived = math.sqrt((gradient**2).mean())
        pull = math.sqrt((self.loss_slope(z) ** 2).mean()) / self.weight
        if arrived > 0 and pull > 0 and math.isfinite(arrived):
            n = min(self.compared, self.forget)
            self.lm_gradient = (n * self.lm_gradient + arrived) / (n + 1)
            self.ms_gradient = (n * self.ms_gradient + pull) / (n + 1)
            self.compared += 1
            self.weight = self.gradient_ratio * self.lm_gradient / self.ms_gradient

    def step(self, z):
        """Merge one global batch; one without samples or with a NaN counts as a step alone."""
        if len(z) == 0 or not np.isfinite(z).all():
            self.steps += 1
            return
        b, _ = z.shape
        old_mean_var = None if self.m == 0 else self.var.mean()
        chosen = self.selected(z)
        if self.tau is not None:
            eta = max(self.floor, self.rate / math.sqrt(1 + self.updates))
            move = np.clip(eta * (chosen.mean() - self.k) / self.k, -0.5, 0.5)
            self.drift += eta / 4 * move
            self.tau = math.exp(math.log(self.tau) + move + self.drift)
            self.tau *= self.phi(z).mean() / self.mean_ms
            weight = 1 / min(self.updates + 1, self.forget + 1)
            self.share = self.share + weight * (chosen.mean(0) - self.share)
            self.updates += 1
        elif self.steps >= self.start - 1 and self.m > 0 and self.var.any():
            bins = np.floor(np.log2(self.phi(z)) * 32)
            values, counts = np.unique(bins, return_counts=True)
            from_top = np.cumsum(counts[::-1])
            chosen_bin = values[::-1][np.argmax(from_top >= self.k * z.size)]
            self.tau = 2 ** ((chosen_bin + 0.5) / 32)
            self.share = np.zeros(z.shape[1])
        if self.m > 0 and self.var.any():
            self.mean_ms = self.phi(z).mean()
        u, v = z.mean(0), z.var(0)
        if self.m == 0:
            self.mean, self.var, self.m = u, v * b / max(b - 1, 1), b
        else:
            m = self.m
            self.var = m * b * (self.mean - u) ** 2 / ((m + b - 1) * (m + b)) + (
                b * v + (m - 1) * self.var
            ) / (m + b - 1)
            self.mean = (m * self.mean + b * u) / (m + b)
            self.m = m + b
        self.m = min(self.m, self.forget * b)
        if old_mean_var is not None and self.tau is not None:
            self.tau *= old_mean_var / self.var.mean()
            self.mean_ms *= old_mean_var / self.var.mean()
        self.steps += 1
