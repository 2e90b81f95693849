"""What a fit must beat: the straight line through the best runs of the two largest budgets."""

from dataclasses import dataclass

import numpy as np

from gptjax.scaling.table import Table


@dataclass(frozen=True)
class TwoPoint:
    """log loss = intercept + slope log C, through two points: what one draws by hand on log-log paper."""

    flops: tuple[float, float]
    losses: tuple[float, float]

    @property
    def slope(self) -> float:
        return float(np.log(self.losses[1] / self.losses[0]) / np.log(self.flops[1] / self.flops[0]))

    def loss(self, flops):
        """Loss at so many FLOPs, an array of their shape."""
        return self.losses[1] * (np.asarray(flops, float) / self.flops[1]) ** self.slope


def two_point(table: Table) -> TwoPoint | None:
    """The line through the least losses of the two largest budgets; None where there are not two."""
    best = []
    for budget in table.budgets[-2:]:
        of = np.flatnonzero(table.budget == budget)
        best.append(of[np.argmin(table.loss[of])])
    if len(best) < 2:
        return None
    flops, losses = table.flops[best], table.loss[best]
    return TwoPoint((float(flops[0]), float(flops[1])), (float(losses[0]), float(losses[1])))
