"""Known accelerators: speed, memory, network and price of each in one table, and topologies of them by name.

Speeds and sizes are from SHEETS, as read on TABLE_DATE; prices are on demand, from PRICE_SOURCES as read on PRICE_DATE.
Check yours. A test fails once a date is more than a year ago.
"""

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from gptjax.config.section import InputError

TABLE_DATE = "2026-11-29"
SHEETS = (
    "NVIDIA: data sheets of A100, L4, H100, H200, H20, HGX B200, HGX B300 and GB200 NVL72, architecture papers of Ada "
    "and RTX Blackwell (dense products with float32 sums); AMD: data sheets of Instinct MI300X, MI325X and MI355X; "
    "Google Cloud: pages of TPU v4, v5e, v5p, v6e and TPU7x"
)
PRICE_DATE = "2026-09-19"
PRICE_SOURCES = (
    "AWS's EC2 price list (US East) for p4d, p4de, p5, p5en, p6-b200 and p6-b300; Oracle Cloud's price list for GB200, "
    "MI300X and MI355X; Google's Cloud TPU price list (US regions)"
)


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device of jax: bytes, bytes a second, FLOP/s of dense products. 0: unknown, or it has none."""

    bfloat16: float
    float32: float
    """At jax's default precision: TF32 on NVIDIA from Ampere on, float32 on AMD, one bfloat16 pass on a TPU."""
    memory: float = 0
    bandwidth: float = 0
    """Of the chip's own memory."""
    link: float = 0
    """Bytes a second of a collective within a host (NVLink, PCIe) or along one axis of a torus, both directions."""
    network: float = 0
    """Bytes a second: a chip's share of the network between hosts."""
    host: int = 8
    """Devices that share a host, or NVLink."""
    devices: int = 1
    """Devices of jax on one chip."""
    cuda: bool = True
    """A GPU of NVIDIA."""
    torus: int = 0
    """Dimensions of a TPU slice's torus; 0 for GPUs."""
    price: float = 0
    """Dollars an hour for a chip, all its devices."""
    tpu: str = ""
    """libtpu's name of its topologies."""

    def flops(self, dtype: str) -> float:
        return self.bfloat16 if dtype == "bfloat16" else self.float32


_T, _G = 1e12, 1e9

# The first entry whose words all occur in a jax device kind is that device. T4 and V100 have float16 tensor cores only.
# A device of jax is half a chip on TPU v2, v3 and 7x. Memory is what a program can use, less than the data sheet's.
CHIPS = {
    "gb200": Chip(bfloat16=2500 * _T, float32=1250 * _T, memory=185 * _G, bandwidth=8000 * _G, link=900 * _G,
                  network=50 * _G, host=72, price=16.00),
    "b300": Chip(bfloat16=2250 * _T, float32=1125 * _T, memory=267 * _G, bandwidth=8000 * _G, link=900 * _G,
                 network=100 * _G, price=17.80),
    "b200": Chip(bfloat16=2250 * _T, float32=1125 * _T, memory=179 * _G, bandwidth=8000 * _G, link=900 * _G,
                 network=50 * _G, price=14.24),
    "h20": Chip(bfloat16=148 * _T, float32=74 * _T, memory=95 * _G, bandwidth=4000 * _G, link=450 * _G,
                network=50 * _G),
    "h200 nvl": Chip(bfloat16=835.5 * _T, float32=417.5 * _T, memory=140 * _G, bandwidth=4800 * _G, link=450 * _G,
                     host=4),
    "h200": Chip(bfloat16=989.4 * _T, float32=494.7 * _T, memory=140 * _G, bandwidth=4800 * _G, link=450 * _G,
                 network=50 * _G, price=7.91),
    "h100 pcie": Chip(bfloat16=756 * _T, float32=378 * _T, memory=79 * _G, bandwidth=2000 * _G, link=64 * _G),
    "h100 nvl": Chip(bfloat16=835 * _T, float32=417.5 * _T, memory=93 * _G, bandwidth=3900 * _G, link=300 * _G, host=2),
    "h100": Chip(bfloat16=989.4 * _T, float32=494.7 * _T, memory=79 * _G, bandwidth=3350 * _G, link=450 * _G,
                 network=50 * _G, price=6.88),
    "a100 40gb": Chip(bfloat16=312 * _T, float32=156 * _T, memory=39 * _G, bandwidth=1555 * _G, link=300 * _G,
                      network=6.25 * _G, price=2.75),
    "a100": Chip(bfloat16=312 * _T, float32=156 * _T, memory=79 * _G, bandwidth=2039 * _G, link=300 * _G,
                 network=6.25 * _G, price=3.43),
    "v100": Chip(bfloat16=125 * _T, float32=15.7 * _T),
    "t4": Chip(bfloat16=65 * _T, float32=8.1 * _T),
    "l4": Chip(bfloat16=121 * _T, float32=60 * _T, memory=22 * _G, bandwidth=300 * _G, link=32 * _G),
    "a10g": Chip(bfloat16=70 * _T, float32=35 * _T, memory=22 * _G, bandwidth=600 * _G, link=32 * _G),
    "rtx 5090": Chip(bfloat16=209.5 * _T, float32=104.8 * _T, memory=31 * _G, bandwidth=1792 * _G, link=64 * _G),
    "rtx 5080": Chip(bfloat16=112.6 * _T, float32=56.3 * _T, memory=15 * _G, bandwidth=960 * _G, link=64 * _G),
    "rtx 5070 ti": Chip(bfloat16=87.9 * _T, float32=43.9 * _T, memory=15 * _G, bandwidth=896 * _G, link=64 * _G),
    "rtx 5070": Chip(bfloat16=61.7 * _T, float32=30.9 * _T, memory=11 * _G, bandwidth=672 * _G, link=64 * _G),
    "rtx 4090": Chip(bfloat16=165.2 * _T, float32=82.6 * _T, memory=23 * _G, bandwidth=1008 * _G, link=32 * _G),
    "mi355x": Chip(bfloat16=2516.6 * _T, float32=157.3 * _T, memory=287 * _G, bandwidth=8000 * _G, link=537.6 * _G,
                   network=50 * _G, cuda=False, price=8.60),
    "mi325x": Chip(bfloat16=1307.4 * _T, float32=163.4 * _T, memory=255 * _G, bandwidth=6000 * _G, link=448 * _G,
                   network=50 * _G, cuda=False),
    "mi300x": Chip(bfloat16=1307.4 * _T, float32=163.4 * _T, memory=191 * _G, bandwidth=5300 * _G, link=448 * _G,
                   network=50 * _G, cuda=False, price=6.00),
    "tpu7x": Chip(bfloat16=1153.5 * _T, float32=1153.5 * _T, memory=94.75 * 2**30, bandwidth=3690 * _G, link=90 * _G,
                  devices=2, torus=3, tpu="tpu7x"),
    "tpu v6": Chip(bfloat16=918 * _T, float32=918 * _T, memory=31.25 * 2**30, bandwidth=1640 * _G, link=180 * _G,
                   torus=2, price=2.70, tpu="v6e"),
    "tpu v5 lite": Chip(bfloat16=197 * _T, float32=197 * _T, memory=15.75 * 2**30, bandwidth=819 * _G, link=90 * _G,
                        torus=2, price=1.20, tpu="v5e"),
    "tpu v5": Chip(bfloat16=459 * _T, float32=459 * _T, memory=95.74 * 2**30, bandwidth=2765 * _G, link=180 * _G,
                   host=4, torus=3, price=4.20, tpu="v5p"),
    "tpu v4": Chip(bfloat16=275 * _T, float32=275 * _T, memory=30.75 * 2**30, bandwidth=1228 * _G, link=90 * _G,
                   host=4, torus=3, price=3.22, tpu="v4"),
    "tpu v3": Chip(bfloat16=61.5 * _T, float32=61.5 * _T),
    "tpu v2": Chip(bfloat16=22.5 * _T, float32=22.5 * _T),
}  # fmt: skip
# Other names of devices, and the names in topologies.
ALIASES = {"tpu v5e": "tpu v5 lite", "tpu v5p": "tpu v5", "v4": "tpu v4", "v5e": "tpu v5 lite", "v5p": "tpu v5",
           "v6e": "tpu v6", "a100-40gb": "a100 40gb", "a100-80gb": "a100", "rtx4090": "rtx 4090", "rtx5090": "rtx 5090",
           "rtx5080": "rtx 5080"}  # fmt: skip

# The kinds that `gptjax plan --topology` accepts.
SLICES = ("v4", "v5e", "v5p", "v6e", "tpu7x")
NODES = ("gb200", "b300", "b200", "h200", "h100", "h20", "a100", "a100-40gb", "l4", "rtx5090", "rtx5080", "rtx4090",
         "mi355x", "mi325x", "mi300x", "cpu")  # fmt: skip
# By dimensions of the torus: all slices of two; of three, those smaller than a cube of 4x4x4, since larger slices are
# made of such cubes (Google's pages of v5e, v6e, v4, v5p and TPU7x).
SHAPES = {2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"), 3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4")}
EXAMPLES = "v5e:4x4, v5p:2x2x4, h100:8, cpu:8"


def sheet_flops(kind: str, dtype: str) -> float | None:
    """The data sheet's FLOP/s for a jax device kind; None where `chip_of` knows no chip."""
    chip = chip_of(kind)
    return chip.flops(dtype) if chip else None


def chip_of(kind: str) -> Chip | None:
    """The chip of a jax device kind; None for unknown kinds, MIG slices and laptop versions."""
    words = set(kind.lower().replace("-", " ").split())
    if {"mig", "laptop"} & words:
        return None
    names = [*CHIPS, *(name for name in ALIASES if name.startswith("tpu "))]
    # The longest name first: "tpu v5 lite" before "tpu v5".
    for name in sorted(names, key=lambda name: -len(name.split())):
        if set(name.split()) <= words:
            return CHIPS[ALIASES.get(name, name)]
    return None


def device_memory() -> int:
    """Bytes that a device of this process can use: its own, or for CPU devices a share of what the host has free."""
    local = jax.local_devices()
    sizes = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in local]
    return min(sizes) or host_memory()[1] // len(local)


def host_memory() -> tuple[int, int]:
    """(total, free) bytes of memory, of the machine or the container."""
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        sizes = {words[0]: int(words[1]) * 1024 for words in lines}
        total, free = sizes["MemTotal:"], sizes["MemAvailable:"]
    except (OSError, KeyError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = total
    limit, used = first_line("/sys/fs/cgroup/memory.max"), first_line("/sys/fs/cgroup/memory.current")
    if limit.isdecimal() and used.isdecimal():
        total, free = min(total, int(limit)), min(free, int(limit) - int(used))
    return total, free


def first_line(path: str) -> str:
    """The first line of a file of the system; empty where there is none."""
    try:
        return Path(path).read_text().split("\n")[0]
    except OSError:
        return ""


def describe_devices() -> dict[str, Any]:
    """`platform`, `kind` and `count` of the devices of all processes."""
    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}


@dataclass(frozen=True)
class Topology:
    """A number of chips of one kind: a TPU slice by its shape, GPUs in hosts, or fake CPU devices."""

    name: str
    chip: Chip | None  # None: CPU devices, used to count memory
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * (self.chip.devices if self.chip else 1)

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]

    @property
    def hosts(self) -> int:
        return math.ceil(self.devices / self.chip.host) if self.chip else 1

    @property
    def libtpu(self) -> str:
        """libtpu's name of a TPU slice; empty for other topologies."""
        return f"{self.chip.tpu}:{self.name.partition(':')[2]}" if self.chip and self.chip.tpu else ""

    def bandwidth(self, devices: int, inner: int = 1) -> float:
        """Bytes a second that each device sends in a collective over `devices`, `inner` devices between neighbours.

        In a torus, a group larger than one dimension uses the links of several; the devices of one chip share its
        links. On GPU hosts, a group within a host has NVLink, and one across hosts the chip's share of the network.
        """
        assert self.chip is not None, "CPU devices have no network"
        if not self.chip.torus:
            within = devices * inner <= self.chip.host
            return self.chip.link if within or not self.chip.network else self.chip.network
        covered, used = self.chip.devices, 0
        for length in sorted(self.shape, reverse=True):
            if covered >= devices:
                break
            covered, used = covered * length, used + (length > 1)
        return self.chip.link * max(1, used)


def topology(name: str, prices: Mapping[str, float] = MappingProxyType({})) -> Topology:
    """The topology named v5e:4x4, h100:8 or cpu:8, its chip at the price of its kind; raises InputError for others."""
    kind, colon, size = name.lower().partition(":")
    known = [*SLICES, *NODES]
    wanted = f"wanted one of {', '.join(known)} with a size, e.g. {EXAMPLES}"
    if kind not in known:
        close = difflib.get_close_matches(kind, known, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"--topology {name}: {kind or 'nothing'} is not known{meant}; {wanted}")
    numbers = size.split("x")
    if not colon or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise InputError(f"--topology {name}: no size; {wanted}")
    shape = tuple(map(int, numbers))
    if kind == "cpu":
        return Topology(f"{kind}:{size}", None, (math.prod(shape),))
    chip = CHIPS[ALIASES.get(kind, kind)]
    chip = replace(chip, price=prices.get(kind, chip.price))
    if chip.torus and len(shape) != chip.torus:
        example = {2: "4x4", 3: "2x2x4"}[chip.torus]
        raise InputError(f"--topology {name}: a slice of {kind} has {chip.torus} dimensions, e.g. {kind}:{example}")
    cubes = chip.torus == 3 and not any(side % 4 for side in shape)
    if chip.torus and not cubes and "x".join(map(str, shape)) not in SHAPES[chip.torus]:
        larger = " or sides that are multiples of 4" if chip.torus == 3 else ""
        raise InputError(
            f"--topology {name}: no slice of {kind} has that shape; wanted {', '.join(SHAPES[chip.torus])}{larger}"
        )
    return Topology(f"{kind}:{size}", chip, shape if chip.torus else (math.prod(shape),))
