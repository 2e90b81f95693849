"""The settings that `gptjax verify` trains: tiny models, meshes, and options whose values meet in pairs."""

import dataclasses
import itertools
from typing import Any

from gptjax.config import MeshConfig, ModelConfig, VisionConfig
from gptjax.config.attention import KERNELS
from gptjax.ops.attention import unsupported_reason
from gptjax.ops.device import device
from gptjax.parallel.sharding import AXES

GPT2 = ModelConfig(num_layers=2, width=32, num_heads=4, attention_block=5, dtype="float32")
MODELS = {
    "gpt2": GPT2,
    "llama": dataclasses.replace(
        GPT2, positions="rope", norm="rmsnorm", activation="swiglu", biases=False, tied=False, queries_per_kv=2
    ),
    "modern": dataclasses.replace(
        GPT2, positions="rope", norm="rmsnorm", activation="relu2", biases=False, tied=False, qk_norm=True, window=5,
        global_every=2, attention_softcap=20.0, logit_softcap=15.0,
    ),
    "images": dataclasses.replace(
        GPT2, vision=VisionConfig(patch=2, side=8, merge=2, layers=2, width=16, num_heads=4)
    ),
    # Heads of a size that the kernels of accelerators support.
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
        return dataclasses.replace(MODELS[self.family], **changes)


def mesh_name(mesh: MeshConfig | None) -> str:
    if mesh is None:
        return "one"
    return " ".join(f"{axis}={n}" for axis, n in zip(AXES, sizes(mesh)) if n != 1) or "data=1"


def sizes(mesh: MeshConfig) -> tuple[int, ...]:
    return tuple(mesh.sizes.values())


def meshes(count: int, slices: int = 1) -> list[MeshConfig]:
    """The meshes of `count` devices: all up to 15 of them, else one for each set of axes in use.

    Sizes are those that divide the tiny models: powers of two up to 8 for fsdp, tensor and context; data takes the
    rest, and is divided over the slices.
    """
    all_meshes = []
    extra = {"slices": slices} if slices > 1 else {}
    for fsdp, tensor, context in itertools.product((1, 2, 4, 8), repeat=3):
        data, rest = divmod(count, fsdp * tensor * context)
        if rest == 0 and data % slices == 0:
            all_meshes.append(MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context, **extra))
    if len(all_meshes) <= 15:
        return all_meshes
    even: dict[tuple, MeshConfig] = {}  # by the axes in use: the one whose largest size is smallest
    for mesh in sorted(all_meshes, key=lambda mesh: max(sizes(mesh))):
        even.setdefault(tuple(n > 1 for n in sizes(mesh)), mesh)
    return list(even.values())


# The design: half h of block r has each two-valued option at value h, except option r, which has 1 - h. So every pair
# of values of two options, and every value with every remat, occur within eight settings.
REMATS = ("none", "full", "dots", "names")
OPTIONS: dict[str, tuple] = {
    "attention": ("plain", "blockwise"), "packing": ("packed", "padded"), "unroll": (1, 0), "accumulate": (1, 4),
}  # fmt: skip


def settings(over: list[MeshConfig]) -> list[Setting]:
    """Settings over these meshes: each mesh at least once, and every pair of values of two options."""
    tried = []
    for i in range(max(len(over), 2 * len(REMATS))):
        turn, half = divmod(i % (2 * len(REMATS)), 2)
        options = {name: values[half ^ (r == turn)] for r, (name, values) in enumerate(OPTIONS.items())}
        # The next eight settings have the other family, so that options meet both.
        family = ("gpt2", "llama")[half ^ (i // (2 * len(REMATS)) % 2)]
        tried.append(Setting(family=family, mesh=over[i % len(over)], remat=REMATS[turn], **options))
    tried.append(Setting(family="gpt2", mesh=over[-1], remat="offload"))
    tried += [
        Setting(family="images", mesh=over[-1], accumulate=4),
        Setting(family="images", mesh=over[0], remat="full"),
    ]
    whole = next(mesh for mesh in reversed(over) if mesh.context == 1)  # kernels of accelerators need whole rows
    usable = [name for name in PLATFORM_KERNELS if not unsupported_kernel(name)]
    return tried + [Setting(family=kernel_model(n), attention=n, mesh=mesh) for n in usable for mesh in (None, whole)]


PLATFORM_KERNELS = tuple(name for name, kernel in KERNELS.items() if kernel.only_on)


def kernel_model(name: str) -> str:
    return "kernels" if "float32" in KERNELS[name].dtypes else "kernels16"


def unsupported_kernel(name: str) -> str:
    """The reason why a kernel for attention does not run on these devices; empty where it does."""
    return unsupported_reason(name, MODELS[kernel_model(name)], device())
