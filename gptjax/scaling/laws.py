"""Scaling laws as published: loss from parameters, tokens and compute, each with its source. NumPy in, NumPy out.

N is the number of parameters, D of trained tokens, C of training FLOPs; losses are in nats a token. Coefficients may be
arrays too (say of shape [bootstraps, 1]), so one law can stand for a sample of laws; results then have both shapes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.settings import InputError

PETAFLOP_DAY = 1e15 * 24 * 3600  # FLOPs


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

    def optimal(self, flops, flops_per: float = 6.0):
        """(N, D) of the least loss at C = flops_per * N * D training FLOPs, in closed form (equation 4)."""
        a, _ = self.exponents
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        product = np.asarray(flops, float) / flops_per
        N = G * product**a
        return N, product / N


HOFFMANN = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)  # equation 10, rounded there
BESIROGLU = Chinchilla(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)  # 2024, section 3: the same data again


@dataclass(frozen=True)
class OverTraining:
    """L = E + a N^e + b 6^(e/2) (M N)^e, with M = D / N tokens a parameter (Gadre et al. 2024).

    These are the coefficients of the paper's released code. Its equation 4 says the same in compute C = 6 N D:
    L = E + (a' M^eta + b M^-eta) C^-eta, with eta = -e / 2 and a' = a 6^eta; `published` converts.
    """

    E: Any
    a: Any
    b: Any
    e: Any

    def loss(self, N, D):
        N, D = np.asarray(N, float), np.asarray(D, float)
        return self.E + self.a * N**self.e + self.b * 6 ** (self.e / 2) * D**self.e

    def loss_of_compute(self, C, M):
        """Loss after C = 6 N D FLOPs at M tokens a parameter."""
        N = np.sqrt(np.asarray(C, float) / (6 * np.asarray(M, float)))
        return self.loss(N, M * N)

    @property
    def published(self) -> dict[str, Any]:
        """E, a, b and eta of the paper's equation 4."""
        return {"E": self.E, "a": self.a * 6 ** (-self.e / 2), "b": self.b, "eta": -self.e / 2}

    def optimal(self, flops, flops_per: float = 6.0):
        """(N, D) of the least loss at C = flops_per * N * D: the law is Chinchilla's with alpha = beta = -e."""
        law = Chinchilla(self.E, self.a, self.b * 6 ** (self.e / 2), -self.e, -self.e)
        return law.optimal(flops, flops_per)


@dataclass(frozen=True)
class DataConstrained:
    """Chinchilla's law on effective parameters and tokens where only U tokens are unique (Muennighoff et al. 2023).

    D' = U + U R_D (1 - exp(-(D/U - 1) / R_D)), and N' likewise of U_N, the parameters that U tokens would be optimal
    for, with R_N (equations 5 and 6): after R_D repetitions another epoch is worth 1/e of new tokens.
    """

    chinchilla: Chinchilla
    R_D: Any
    R_N: Any

    def loss(self, N, D, U):
        """Raises InputError where more tokens are unique than are trained on."""
        N, D, U = (np.asarray(v, float) for v in (N, D, U))
        if np.any(U > D):
            raise InputError(f"unique tokens={U.max():g} are more than the trained tokens={D.min():g}: wanted U <= D")
        law = self.chinchilla
        G = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
        U_N = np.minimum(N, (U * G) ** (law.beta / law.alpha) * G)
        return law.loss(saturate(U_N, N / U_N - 1, self.R_N), saturate(U, D / U - 1, self.R_D))

    def optimal(self, flops: float, U: float, flops_per: float = 6.0) -> tuple[float, float]:
        """(N, D) of the least loss at C = flops_per * N * D with U unique tokens, to 1 part in 1,000.

        Found on a fine grid of D from the unconstrained optimum / 100 to 100 times it: there is no closed form.
        """
        _, D = self.chinchilla.optimal(flops, flops_per)
        D = D * np.geomspace(0.01, 100, 9211)  # 1.001 apart
        N = flops / flops_per / D
        best = int(np.argmin(self.loss(N, D, np.minimum(U, D))))
        return float(N[best]), float(D[best])


def saturate(unique, repeats, half):
    """What `unique` units are worth when seen `repeats` more times: unique (1 + R (1 - exp(-repeats / R)))."""
    return unique * (1 + half * (1 - np.exp(-repeats / half)))


# The fit on C4 of the paper's released code (appendix A rounds it: A=521, B=1488, E=1.87, alpha=beta=0.35).
MUENNIGHOFF = DataConstrained(
    Chinchilla(np.exp(0.6254804), np.exp(6.255414), np.exp(7.3049974), 0.3526596, 0.3526596),
    R_D=15.387756,
    R_N=5.309743,
)


@dataclass(frozen=True)
class Kaplan:
    """Power laws of Kaplan et al. 2020, for N without embeddings; the defaults are theirs, on WebText2.

    Their tokens and vocabulary (50,257) set the scale of N_c, D_c and C_c, which mean nothing by themselves.
    """

    alpha_N: float = 0.076  # equation 1.1
    N_c: float = 8.8e13
    alpha_D: float = 0.095  # equation 1.2
    D_c: float = 5.4e13
    alpha_C: float = 0.050  # equation 1.3
    C_c: float = 3.1e8  # petaflop-days
    joint: tuple[float, float, float, float] = (0.076, 0.103, 6.4e13, 1.8e13)  # table 2: alpha_N, alpha_D, N_c, D_c

    def loss_of_parameters(self, N):
        """L(N) = (N_c / N)^alpha_N: trained to convergence on enough data (equation 1.1)."""
        return (self.N_c / np.asarray(N, float)) ** self.alpha_N

    def loss_of_tokens(self, D):
        """L(D) = (D_c / D)^alpha_D: a large model, stopped early (equation 1.2)."""
        return (self.D_c / np.asarray(D, float)) ** self.alpha_D

    def loss_of_compute(self, C):
        """L(C_min) = (C_c / C_min)^alpha_C, C in FLOPs at the best size and a batch far below critical (1.3)."""
        return (self.C_c * PETAFLOP_DAY / np.asarray(C, float)) ** self.alpha_C

    def loss(self, N, D):
        """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (equation 1.5, constants of table 2)."""
        alpha_N, alpha_D, N_c, D_c = self.joint
        N, D = np.asarray(N, float), np.asarray(D, float)
        return ((N_c / N) ** (alpha_N / alpha_D) + D_c / D) ** alpha_D


@dataclass(frozen=True)
class PowerLaw:
    """L(C) = E + K / C^gamma: the least loss at a budget, as compute-optimal runs trace it."""

    E: Any
    K: Any
    gamma: Any

    def loss(self, C):
        return self.E + self.K * np.asarray(C, float) ** -self.gamma


@dataclass(frozen=True)
class TwoPoint:
    """log loss = intercept + slope log C through two points: a line drawn by hand, and what a fit must beat."""

    flops: tuple[float, float]
    losses: tuple[float, float]

    @property
    def slope(self) -> float:
        return float(np.log(self.losses[1] / self.losses[0]) / np.log(self.flops[1] / self.flops[0]))

    def loss(self, C):
        return self.losses[1] * (np.asarray(C, float) / self.flops[1]) ** self.slope
