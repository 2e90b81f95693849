"""The letters of a name are its sharding; a mesh lies on the network as its axes need."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.config.section import InputError
from gptjax.parallel.sharding import (
    constrain,
    make_mesh,
    num_slices,
    require_mesh,
    sharding_of,
    spec,
    suffix,
    to_global,
)

P = jax.P


def test_letters_become_mesh_axes_and_an_axis_is_spent_once():
    assert spec("DHK") == P("fsdp", "tensor", None)
    assert spec("NDHK") == P(None, "fsdp", "tensor", None)
    assert spec("BLD") == P(("data", "fsdp"), "context", None)
    assert spec("BLV") == P(("data", "fsdp"), "context", "tensor")
    assert spec("NBMGK") == P(None, ("data", "fsdp"), None, "tensor", None)
    assert spec("D") == P(None) and spec("ND") == P(None, None) and spec("NF") == P(None, None)
    assert spec("B") == P(("data", "fsdp"))


def test_the_suffix_is_what_follows_the_last_underscore():
    assert [suffix(n) for n in ("q_NDHK", "w_in_DF")] == ["NDHK", "DF"]
    assert not any(suffix(n) for n in ("step", "w_in", "count", "bias_Dx"))


def test_a_mesh_must_cover_the_devices():
    assert dict(make_mesh(MeshConfig(fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    with pytest.raises(InputError, match="mesh.tensor=3.* 8 device"):
        make_mesh(MeshConfig(tensor=3))
    with pytest.raises(InputError, match="mesh.data=2.* 8 device"):
        make_mesh(MeshConfig(data=2))
    with pytest.raises(InputError, match="mesh.data"):
        MeshConfig(data=-1, fsdp=-1)


@dataclasses.dataclass(frozen=True)
class Device:
    """What the layout of a mesh asks of a device."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "a kind"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def slices(num_slices: int, devices_each: int, **more) -> list[Device]:
    """Devices of several slices of two processes each, in an order that says nothing."""
    half = devices_each // 2
    made = [Device(i, i // half, i // devices_each, **more) for i in range(num_slices * devices_each)]
    return [made[i] for i in np.random.default_rng(0).permutation(len(made))]


def test_only_the_data_axis_crosses_slices():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=2, context=2, slices=2), slices(2, 16))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 2, "context": 2}
    slice_of = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    for axis in (1, 2, 3):
        assert (slice_of.min(axis=axis) == slice_of.max(axis=axis)).all()
    assert slice_of[:, 0, 0, 0].tolist() == [0, 0, 1, 1]  # each slice has one stretch of it
    assert len(set(mesh.devices.flat)) == 32


def test_devices_without_slices_are_cut_by_their_processes():
    nodes = [dataclasses.replace(d, slice_index=None) for d in slices(1, 8)]
    mesh = make_mesh(MeshConfig(fsdp=4, slices=2), nodes)
    processes = np.vectorize(lambda d: d.process_index)(mesh.devices)
    assert processes.reshape(2, 4).tolist() == [[0] * 4, [1] * 4]


def test_a_slice_of_a_tpu_keeps_neighbours_beside_each_other():
    chips = [Device(i, 0, s, "tpu", "TPU v4", (i % 4, i // 4 % 2, 0)) for s in (0, 1) for i in range(s * 8, s * 8 + 8)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=4, slices=2), chips)
    place = np.array([d.coords for d in mesh.devices.flat]).reshape(2, 2, 4, 3)
    steps = np.abs(np.diff(place, axis=2)).sum(axis=-1)
    assert (steps == 1).all()  # along tensor the next device is one link away
    with pytest.raises(InputError, match="mesh.slices=1, but the devices form 2 slices.*set --mesh.slices 2"):
        make_mesh(MeshConfig(tensor=4), chips)
    assert (num_slices(chips), num_slices(slices(2, 4)), num_slices(jax.devices())) == (2, 1, 1)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite", "TPU v4"])
def test_a_mesh_that_no_whole_dimensions_of_a_slice_make_up_is_laid_out_too(kind):
    chips = [Device(i, 0, s, "tpu", kind, (i % 4, i // 4 % 4, 0)) for s in (0, 1) for i in range(s * 16, s * 16 + 16)]
    alone = make_mesh(MeshConfig(data=2, fsdp=8), chips[:16])
    joined = make_mesh(MeshConfig(data=4, fsdp=8, slices=2), chips)
    for mesh, count in ((alone, 2), (joined, 4)):
        place = np.array([d.coords for d in mesh.devices.flat]).reshape(count, 8, 3)
        assert len({d.id for d in mesh.devices.flat}) == count * 8
        assert (np.ptp(place, axis=1) + 1).prod(axis=-1).tolist() == [8] * count  # eight chips that lie together


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        (MeshConfig(slices=3), slices(2, 8), "mesh.slices=3.*16 device.* form 2 slice.*4 process.*one of these"),
        (MeshConfig(fsdp=8, slices=4), slices(2, 8), "mesh.data=2 .*make mesh.data a multiple of 4"),
        (MeshConfig(slices=2), [*slices(2, 8)[:-1], Device(99, 1, 1)][3:], "slices of .* devices do not each"),
    ],
    ids=["other number", "data", "unequal"],
)
def test_devices_that_do_not_form_the_slices_are_refused(mesh, devices, message):
    with pytest.raises(InputError, match=message):
        make_mesh(mesh, devices)
    with pytest.raises(InputError, match="mesh.data=6: wanted a multiple of mesh.slices=4"):
        MeshConfig(data=6, slices=4)


def test_heads_that_do_not_divide_stay_whole_and_widths_that_do_not_are_refused():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    assert sharding_of("k_NDGK", (2, 8, 2, 4), mesh).spec == P(None, "fsdp", None, None)
    with pytest.raises(InputError, match="F=6 of w_in_DF"):
        sharding_of("w_in_DF", (8, 6), mesh)


def test_a_name_without_letters_is_refused_unless_it_is_a_scalar():
    mesh = make_mesh(MeshConfig())
    assert sharding_of("count", (), mesh).spec == P()
    with pytest.raises(AssertionError, match="one letter a dimension"):
        sharding_of("moments", (3,), mesh)


def test_constrain_leaves_what_does_not_divide_and_does_nothing_without_a_mesh():
    x_BLD = jnp.zeros((1, 4, 8))
    assert constrain(x_BLD, "BLD") is x_BLD
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert jax.jit(lambda x: constrain(x, "BLD"))(x_BLD).sharding.is_fully_replicated
        assert not jax.jit(lambda x: constrain(x, "BLD"))(jnp.zeros((8, 4, 8))).sharding.is_fully_replicated


def test_state_on_several_devices_without_a_mesh_is_an_error():
    mesh = make_mesh(MeshConfig())
    batch = to_global({"inputs_BL": np.arange(16, dtype=np.int32).reshape(8, 2)}, mesh)
    np.testing.assert_array_equal(batch["inputs_BL"], np.arange(16).reshape(8, 2))
    with pytest.raises(InputError, match="no mesh is set"):
        require_mesh(batch)
    with jax.set_mesh(mesh):
        require_mesh(batch)
    require_mesh({"inputs_BL": jnp.zeros((8, 2))})
