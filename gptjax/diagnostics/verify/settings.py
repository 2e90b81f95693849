"""What is tried: tiny models, the meshes of so many devices, and options such that every two of their values meet."""

import dataclasses
import itertools
from typing import Any

from gptjax.config import MeshConfig, ModelConfig
from gptjax.config.attention import KERNELS
from gptjax.ops.attention import current_device, unsupported_reason
from gptjax.parallel.sharding import AXES, axis_sizes

GPT2 = ModelConfig(num_layers=2, width=32, num_heads=4, attention_block=5, dtype="float32")
FAMILIES = {
    "gpt2": GPT2,
    "llama": dataclasses.replace(
        GPT2, positions="rope", norm="rmsnorm", activation="swiglu", biases=False, tied=False, queries_per_kv=2
    ),
    "modern": dataclasses.replace(
        GPT2, positions="rope", norm="rmsnorm", activation="relu2", biases=False, tied=False, qk_norm=True, window=5,
        global_every=2, attention_softcap=20.0, logit_softcap=15.0,
    ),
    # Heads as large as the kernels of accelerators ask for.
    "kernels": dataclasses.replace(GPT2, head_dim=128, num_heads=2),
    "kernels16": dataclasses.replace(GPT2, head_dim=128, num_heads=2, dtype="bfloat16"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train a tiny model; `mesh` None is a single device."""

    family: str
    mesh: MeshConfig | None = None
    accumulate: int = 1
    remat: str = "none"
    unroll: int = 1
    packing: str = "packed"
    attention: str = "plain"

    def __str__(self) -> str:
        words = [self.family, mesh_name(self.mesh), f"accumulate={self.accumulate}", f"remat={self.remat}",
                 f"unroll={self.unroll}", self.packing, self.attention]  # fmt: skip
        return " ".join(words)

    @property
    def reference(self) -> "Setting":
        return Setting(family=self.family)

    @property
    def model(self) -> ModelConfig:
        changes: dict[str, Any] = {"remat": self.remat, "unroll": self.unroll, "attention": self.attention}
        return dataclasses.replace(FAMILIES[self.family], **changes)


def mesh_name(mesh: MeshConfig | None) -> str:
    if mesh is None:
        return "one"
    return " ".join(f"{axis}={n}" for axis, n in zip(AXES, sizes(mesh)) if n != 1) or "data=1"


def sizes(mesh: MeshConfig) -> tuple[int, ...]:
    return tuple(axis_sizes(mesh).values())


def meshes(count: int, slices: int = 1) -> list[MeshConfig]:
    """The meshes of so many devices: all of them, up to 15, else one for each set of axes that share the devices.

    What the tiny models divide over: powers of two up to 8 along fsdp, tensor and context; data takes the rest, and is
    cut over the slices.
    """
    found = []
    cut = {"slices": slices} if slices > 1 else {}
    for fsdp, tensor, context in itertools.product((1, 2, 4, 8), repeat=3):
        data, rest = divmod(count, fsdp * tensor * context)
        if rest == 0 and data % slices == 0:
            found.append(MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context, **cut))
    if len(found) <= 15:
        return found
    even: dict[tuple, MeshConfig] = {}  # by the axes in use: the one whose largest size is smallest
    for mesh in sorted(found, key=lambda mesh: max(sizes(mesh))):
        even.setdefault(tuple(n > 1 for n in sizes(mesh)), mesh)
    return list(even.values())


# How the options are laid over the settings: half h of block r has each two-valued option at h, but the one whose turn
# it is at 1 - h. So every two values of two options, and every value with every remat, meet within eight settings.
REMATS = ("none", "full", "dots", "names")
OPTIONS: dict[str, tuple] = {
    "attention": ("plain", "blockwise"), "packing": ("packed", "padded"), "unroll": (1, 0), "accumulate": (1, 4),
}  # fmt: skip


def settings(over: list[MeshConfig]) -> list[Setting]:
    """What is tried over these meshes: every one, with options such that every two of their values meet."""
    tried = []
    for i in range(max(len(over), 2 * len(REMATS))):
        turn, half = divmod(i % (2 * len(REMATS)), 2)
        options = {name: values[half ^ (r == turn)] for r, (name, values) in enumerate(OPTIONS.items())}
        # The next eight settings have the other family, so that options meet both.
        family = ("gpt2", "llama")[half ^ (i // (2 * len(REMATS)) % 2)]
        tried.append(Setting(family=family, mesh=over[i % len(over)], remat=REMATS[turn], **options))
    tried.append(Setting(family="gpt2", mesh=over[-1], remat="offload"))
    whole = next(mesh for mesh in reversed(over) if mesh.context == 1)  # a kernel wants whole rows
    usable = [name for name in OF_ONE_PLATFORM if not kernel_obstacle(name)]
    return tried + [Setting(family=kernel_family(n), attention=n, mesh=mesh) for n in usable for mesh in (None, whole)]


OF_ONE_PLATFORM = tuple(name for name, backend in KERNELS.items() if backend.platform)


def kernel_family(name: str) -> str:
    return "kernels" if "float32" in KERNELS[name].dtypes else "kernels16"


def kernel_obstacle(name: str) -> str:
    """What keeps a kernel for attention from these devices; empty: nothing."""
    return unsupported_reason(name, FAMILIES[kernel_family(name)], current_device())
