"""Scaling laws as published: loss from parameters, tokens and compute, each with its source. NumPy in, NumPy out.

N is the number of parameters, D of trained tokens, C of training FLOPs; losses are in nats a token. Coefficients may be
arrays too (say of shape [bootstraps, 1]), so that one object is a sample of laws; results broadcast both shapes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Chinchilla:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2)."""

    E: Any
    A: Any
    B: Any
    alpha: Any
    beta: Any

    def loss(self, N, D):
        N, D = np.asarray(N, float), np.asarray(D, float)
        return self.E + self.A * N**-self.alpha + self.B * D**-self.beta

    @property
    def exponents(self):
        """(a, b) of N_opt ~ C^a and D_opt ~ C^b: (beta, alpha) / (alpha + beta) (equation 4)."""
        return self.beta / (self.alpha + self.beta), self.alpha / (self.alpha + self.beta)

    @property
    def G(self):
        """N_opt / (C / flops_per)^a (equation 4)."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def optimal(self, flops, flops_per: float = 6.0):
        """(N, D) of the least loss at C = flops_per * N * D training FLOPs, in closed form (equation 4)."""
        a, _ = self.exponents
        product = np.asarray(flops, float) / flops_per
        N = self.G * product**a
        return N, product / N


HOFFMANN = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)  # equation 10, rounded there


@dataclass(frozen=True)
class OverTraining:
    """L = E + a N^e + b 6^(e/2) (M N)^e, with M = D / N tokens a parameter (Gadre et al. 2024).

    These are the coefficients of the paper's released code. Its equation 4 is the same law in compute C = 6 N D:
    L = E + (a' M^eta + b M^-eta) C^-eta, with eta = -e / 2 and a' = a 6^eta.
    """

    E: Any
    a: Any
    b: Any
    e: Any

    def loss(self, N, D):
        N, D = np.asarray(N, float), np.asarray(D, float)
        return self.E + self.a * N**self.e + self.b * 6 ** (self.e / 2) * D**self.e

    def optimal(self, flops, flops_per: float = 6.0):
        """(N, D) of the least loss at C = flops_per * N * D: the law is Chinchilla's with alpha = beta = -e."""
        law = Chinchilla(self.E, self.a, self.b * 6 ** (self.e / 2), -self.e, -self.e)
        return law.optimal(flops, flops_per)


@dataclass(frozen=True)
class DataConstrained(Chinchilla):
    """Chinchilla's law on effective parameters and tokens where only U tokens are unique (Muennighoff et al. 2023).

    D' = U + U R_D (1 - exp(-(D/U - 1) / R_D)), and N' likewise of U_N, the parameters that U tokens would be optimal
    for, with R_N (equations 5 and 6): after R_D repetitions another epoch is worth 1/e of new tokens. A run of fewer
    than U tokens has as many unique ones as it trains on; the default of U is infinite.
    """

    R_D: Any
    R_N: Any

    def loss(self, N, D, U=np.inf):
        N, D = np.asarray(N, float), np.asarray(D, float)
        U = np.minimum(U, D)
        U_N = np.minimum(N, (U * self.G) ** (self.beta / self.alpha) * self.G)
        return super().loss(saturate(U_N, N / U_N - 1, self.R_N), saturate(U, D / U - 1, self.R_D))

    def optimal(self, flops, flops_per: float = 6.0, U: float = np.inf):
        """(N, D) of the least loss at C = flops_per * N * D with U unique tokens: Chinchilla's where U suffices.

        Otherwise there is no closed form: four grids of D around it, each as wide as a step of the grid before, find D
        to 1 part in 10,000.
        """
        N, D = np.broadcast_arrays(*super().optimal(flops, flops_per), self.R_D, self.R_N)[:2]
        sufficient, product = D <= U, N * D
        factors, width = np.ones_like(D), np.log(100.0)
        for _ in range(4):
            grid = factors * np.exp(np.linspace(-width, width, 41)).reshape(-1, *[1] * np.ndim(D))
            best = np.argmin(self.loss(product / (D * grid), D * grid, U), axis=0)
            factors, width = np.take_along_axis(grid, best[None], axis=0)[0], width / 20
        D = np.where(sufficient, D, D * factors)
        return product / D, D


def saturate(unique, repeats, half):
    """Effective units of `unique` ones seen `repeats` more times: unique (1 + R (1 - exp(-repeats / R)))."""
    return unique * (1 - half * np.expm1(-repeats / half))


# The fit on C4 of the paper's released code (appendix A rounds it: A=521, B=1488, E=1.87, alpha=beta=0.35).
MUENNIGHOFF = DataConstrained(
    E=np.exp(0.6254804), A=np.exp(6.255414), B=np.exp(7.3049974), alpha=0.3526596, beta=0.3526596,
    R_D=15.387756, R_N=5.309743,
)  # fmt: skip


@dataclass(frozen=True)
class Kaplan:
    """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (Kaplan et al. 2020, equation 1.5).

    The paper's N excludes embeddings. N_c and D_c depend on tokenizer and vocabulary, and have no meaning of their own.
    """

    alpha_N: Any
    alpha_D: Any
    N_c: Any
    D_c: Any

    def loss(self, N, D):
        N, D = np.asarray(N, float), np.asarray(D, float)
        return ((self.N_c / N) ** (self.alpha_N / self.alpha_D) + self.D_c / D) ** self.alpha_D

    @property
    def exponents(self):
        """(a, b) of N_opt ~ C^a and D_opt ~ C^b: (alpha_D, alpha_N) / (alpha_N + alpha_D)."""
        return self.alpha_D / (self.alpha_N + self.alpha_D), self.alpha_N / (self.alpha_N + self.alpha_D)

    def optimal(self, flops, flops_per: float = 6.0):
        """(N, D) of the least loss at C = flops_per * N * D FLOPs, where the gradient of equation 1.5 is 0.

        Not the paper's N ~ C^0.73, which holds for training at the batch of least compute.
        """
        a, _ = self.exponents
        ratio, product = self.alpha_N / self.alpha_D, np.asarray(flops, float) / flops_per
        N = self.N_c ** (1 - a) * (ratio * product / self.D_c) ** a
        return N, product / N


@dataclass(frozen=True)
class PowerLaw:
    """L(C) = E + K / C^gamma: the loss of compute-optimal runs."""

    E: Any
    K: Any
    gamma: Any

    def loss(self, C):
        return self.E + self.K * np.asarray(C, float) ** -self.gamma


KAPLAN_ND = Kaplan(alpha_N=0.076, alpha_D=0.103, N_c=6.4e13, D_c=1.8e13)  # table 2, on WebText2


@dataclass(frozen=True)
class TwoPoint:
    """log loss = intercept + slope log C through two points: the baseline of a fit."""

    flops: tuple[float, float]
    losses: tuple[float, float]

    @property
    def slope(self) -> float:
        return float(np.log(self.losses[1] / self.losses[0]) / np.log(self.flops[1] / self.flops[0]))

    def loss(self, C):
        return self.losses[1] * (np.asarray(C, float) / self.flops[1]) ** self.slope
