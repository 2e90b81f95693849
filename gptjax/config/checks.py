"""What the checks of a machine may be told."""

from dataclasses import dataclass

from gptjax.config.section import Section


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Section):
    """Prove on the devices at hand that every mesh and setting gives the same numbers."""

    json: str = ""
    """File for the results."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Section):
    """What this machine and its cluster can do, and what is wrong with them."""

    json: str = ""
    """File for the findings."""
    run_dir: str = "runs"
    """Where runs will be written: its speed and its space are measured."""
