"""The letters of a name are its sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig, OptimConfig
from gptjax.optim import make_optimizer, make_schedule
from gptjax.settings import InputError
from gptjax.sharding import constrain, make_mesh, put, require_mesh, sharding_of, shardings, spec, suffix

P = jax.P


def test_letters_become_mesh_axes_and_an_axis_is_spent_once():
    assert spec("DHK") == P("fsdp", "tensor", None)
    assert spec("NDHK") == P(None, "fsdp", "tensor", None)
    assert spec("BLD") == P(("data", "fsdp"), "context", None)
    assert spec("BLV") == P(("data", "fsdp"), "context", "tensor")
    assert spec("NBMGK") == P(None, ("data", "fsdp"), None, "tensor", None)


def test_vectors_stay_whole_and_rows_do_not():
    assert spec("D") == P(None) and spec("ND") == P(None, None) and spec("NF") == P(None, None)
    assert spec("B") == P(("data", "fsdp"))


def test_the_suffix_is_what_follows_the_last_underscore():
    assert [suffix(n) for n in ("q_NDHK", "w_in_DF", "step", "w_in", "count", "bias_Dx")] == [
        "NDHK",
        "DF",
        "",
        "",
        "",
        "",
    ]


def test_a_mesh_must_cover_the_devices():
    assert dict(make_mesh(MeshConfig(fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    with pytest.raises(InputError, match="mesh.tensor=3.* 8 device"):
        make_mesh(MeshConfig(tensor=3))
    with pytest.raises(InputError, match="mesh.data=2.* 8 device"):
        make_mesh(MeshConfig(data=2))
    with pytest.raises(InputError, match="mesh.data"):
        MeshConfig(data=-1, fsdp=-1)


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


def test_optimizer_state_lies_where_its_parameters_do():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    params = {"layers": {"q_NDHK": jnp.zeros((2, 8, 2, 4))}, "norm_D": jnp.zeros(8)}
    tx = make_optimizer(OptimConfig(), make_schedule(OptimConfig(), 10))
    where = shardings(jax.eval_shape(tx.init, params), mesh)
    specs = {jax.tree_util.keystr(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(where)}
    assert [s for k, s in specs.items() if "q_NDHK" in k] == [P(None, "fsdp", "tensor", None)] * 2
    assert [s for k, s in specs.items() if "norm_D" in k] == [P(None)] * 2


def test_constrain_leaves_what_does_not_divide_and_does_nothing_without_a_mesh():
    x_BLD = jnp.zeros((1, 4, 8))
    assert constrain(x_BLD, "BLD") is x_BLD
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert jax.jit(lambda x: constrain(x, "BLD"))(x_BLD).sharding.is_fully_replicated
        assert not jax.jit(lambda x: constrain(x, "BLD"))(jnp.zeros((8, 4, 8))).sharding.is_fully_replicated


def test_state_on_several_devices_without_a_mesh_is_an_error():
    mesh = make_mesh(MeshConfig())
    batch = put({"inputs_BL": np.arange(16, dtype=np.int32).reshape(8, 2)}, mesh)
    np.testing.assert_array_equal(batch["inputs_BL"], np.arange(16).reshape(8, 2))
    with pytest.raises(InputError, match="no mesh is set"):
        require_mesh(batch)
    with jax.set_mesh(mesh):
        require_mesh(batch)
    require_mesh({"inputs_BL": jnp.zeros((8, 2))})
