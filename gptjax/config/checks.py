"""Settings of `gptjax verify` and `gptjax doctor`."""

from dataclasses import dataclass

from gptjax.config.section import Section


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Section):
    """Prove on this machine's devices that every mesh and setting gives the same numbers."""

    json: str = ""
    """File for the results."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Section):
    """Check this machine and its cluster, and report problems with advice."""

    json: str = ""
    """File for the findings."""
    run_dir: str = "runs"
    """Folder of runs, whose write speed and free space are measured."""
