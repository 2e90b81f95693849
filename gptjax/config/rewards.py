"""Settings of the rewards that a policy is trained on."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from gptjax.config.section import Section


@dataclass(frozen=True, kw_only=True)
class RewardsConfig(Section):
    """Sources of the reward of an answer, which is the sum of what they give, each times its weight."""

    section: ClassVar[str] = "rewards"

    sources: tuple[str, ...] = ()
    """Functions module:function, or folders of runs by gptjax reward; each as NAME=SOURCE where there are several."""
    weights: tuple[float, ...] = ()
    """One factor for each source, which may be below 0; none: 1 each."""
    unfinished: Literal["fixed", "scored"] = "fixed"
    """Reward of an answer that was cut off: the fixed one below, or what the sources give it."""
    fixed: float = -1.0
    """Reward of an answer that was cut off; it should lie below the usual one."""

    def __post_init__(self):
        entries = self.by_name
        named = len(entries) == len(self.sources) and all(entries.values())
        several = len(self.sources) > 1 and not all(entries)
        self.require(named and not several, "sources", "NAME=SOURCE entries whose names differ, or one SOURCE")
        given = not self.weights or len(self.weights) == len(self.sources)
        self.require(given, "weights", f"one for each of the {len(self.sources)} sources in rewards.sources")
        self.require(all(math.isfinite(w) and w for w in self.weights), "weights", "finite numbers other than 0")
        self.require(math.isfinite(self.fixed), "fixed", "a finite number")

    @property
    def by_name(self) -> dict[str, str]:
        """The sources by name, in their order; one that stands without a name has the empty one."""
        pairs = [(entry, *entry.partition("=")) for entry in self.sources]
        return {name if sign and name.isidentifier() else "": source if sign and name.isidentifier() else entry
                for entry, name, sign, source in pairs}  # fmt: skip
