"""Settings of low-rank adaptation."""

from dataclasses import dataclass
from typing import ClassVar

from gptjax.config.section import Section


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """Low-rank adaptation (Hu et al. 2021): weights W + alpha / rank x a b, of which a and b alone are trained."""

    section: ClassVar[str] = "lora"

    rank: int = 16
    """Rank of the products that are added to the weights."""
    alpha: float = 32.0
    """Scale of the products: they are added times alpha / rank."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "w_in", "w_gate", "w_out")
    """Matrices of the layers that get one, by the names before their letters; those that a model lacks are left out."""

    @property
    def scale(self) -> float:
        """Factor of the product a b."""
        return self.alpha / self.rank

    def __post_init__(self):
        self.require_positive("rank", "alpha")
        known = {"q", "k", "v", "o", "w_in", "w_gate", "w_out"}
        self.require(
            len(self.targets) > 0 and set(self.targets) <= known, "targets", f"some of {', '.join(sorted(known))}"
        )
