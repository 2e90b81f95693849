"""The device that a computation is for: the one place of model, ops and training that asks."""

from typing import NamedTuple

import jax


class Device(NamedTuple):
    """The facts of a device that a choice between ways of computing needs."""

    platform: str
    """cpu, gpu or tpu."""
    capability: float = 0.0
    """Compute capability of an NVIDIA device; 0 for any other."""
    shares_rows: bool = False
    """Several devices share each row: mesh.context is above 1."""
    memory: float = 16e9
    """Bytes of a GPU or TPU; for one that isn't known, those of a small one."""

    @property
    def tiled(self) -> bool:
        """True where arrays are padded to whole tiles."""
        return self.platform == "tpu"


def device() -> Device:
    """The devices of the mesh that is set (jax.set_mesh), present or only compiled for; without one, this process's."""
    mesh = jax.sharding.get_abstract_mesh()
    shares_rows = not mesh.empty and dict(mesh.shape).get("context", 1) > 1
    abstract = None if mesh.empty else mesh.abstract_device
    platform = abstract.platform if abstract is not None else jax.default_backend()
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    if platform == "cpu":
        return Device(platform, shares_rows=shares_rows)
    from gptjax.runtime.hardware import chip_of  # a CPU's process needs none of it

    chip = chip_of(abstract.device_kind if abstract is not None else jax.local_devices()[0].device_kind)
    return Device(platform, _capability(), shares_rows, (chip and chip.memory) or Device._field_defaults["memory"])


def _capability() -> float:
    try:
        return float(jax.local_devices(backend="gpu")[0].compute_capability)
    except (AttributeError, RuntimeError, ValueError):  # no NVIDIA device
        return 0.0
