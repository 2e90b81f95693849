"""Integrity checks: array digests that are the same on any mesh, and a manifest of every file."""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gptjax.config.section import InputError
from gptjax.storage import StorageError, file_sha256, filesystem

P = jax.P

MANIFEST, PENDING = "manifest.json", ".orbax-pending"


def named_leaves(tree: Any) -> dict[str, Any]:
    """Each leaf by its dotted name, in the order of jax.tree.leaves: 'params.layers.q_NDHK', 'opt_state.0.count'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def digests(tree: Any) -> dict[str, int]:
    """A 32-bit digest of each leaf by its dotted name. A leaf with one bit changed always has another digest.

    The bits of each element (as one or two uint32) and its place in the array are mixed into a number, and these are
    summed modulo 2^32; so neither the order of the sum nor the layout over devices matters, and exchanging two
    elements is seen but for a chance of 2^-32.
    """
    leaves = named_leaves(tree)
    meshes = [x.sharding.mesh for x in leaves.values() if isinstance(getattr(x, "sharding", None), NamedSharding)]
    # Several processes can each read the result only if every device has the whole of it.
    numbers = _compiled(NamedSharding(meshes[0], P()) if meshes else None)(list(leaves.values()))
    return dict(zip(leaves, map(int, np.asarray(numbers)), strict=True))


@functools.cache
def _compiled(out_sharding: NamedSharding | None):
    def all_leaves(leaves):
        return jnp.stack([_digest(x) for x in leaves])

    return jax.jit(all_leaves, out_shardings=out_sharding)


def _digest(x: jax.Array) -> jax.Array:
    bits = _bits(jnp.asarray(x))
    # An index made of one term a dimension, since flattening a sharded array would gather it.
    place, stride = jnp.uint32(1), 1
    for dim in reversed(range(bits.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[dim]
    # The finaliser of MurmurHash3: each line maps the 32-bit numbers one to one, so that no change of bits is lost.
    h = bits ^ (place * jnp.uint32(0x9E3779B1))
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """The elements as uint32: narrow types widened, 64-bit ones split in two along a new last dimension."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = min(x.dtype.itemsize * 8, 32)
    assert x.dtype.kind != "c", "complex arrays have no digest"
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}")).astype(jnp.uint32)


def write_manifest(folder: Path, step: int) -> None:
    """Writes the size and sha256 of every file of a step's folder into its manifest, whole or not at all."""
    files = {name: [size, file_sha256(folder / name)] for name, size in sorted(folder_files(folder).items())}
    text = json.dumps({"step": step, "files": files, "sha256": _seal(step, files)}, indent=1)
    # Beside the folder, not inside it: a leftover of a kill must not count as one of its files.
    temporary = folder.with_name(f"{folder.name}.orbax-manifest")
    filesystem(folder).write(folder / MANIFEST, text.encode(), temporary)


def committed_steps(folder: Path) -> list[int]:
    """The steps in a folder of checkpoints that have a manifest, which is written last, in order."""
    names = [n for n in filesystem(folder).names(folder) if re.fullmatch("[0-9]{8,}", n)]
    return sorted(int(n) for n in names if filesystem(folder).is_file(folder / n / MANIFEST))


def unsealed_steps(folder: Path) -> list[str]:
    """The names of the steps without a manifest that a killed save or delete left in a folder of checkpoints.

    Raises InputError for those that lost it in another way, such as a copy of the run without these files.
    """
    files = filesystem(folder)
    names = files.names(folder)
    steps = [n for n in sorted(names) if re.fullmatch("[0-9]{8,}", n) and not files.is_file(folder / n / MANIFEST)]
    if lost := [name for name in steps if name + PENDING not in names]:
        raise InputError(
            f"{folder}: {', '.join(lost)} without {MANIFEST}, though no save was under way; finish copying, bring "
            "these files back, or move the folders away"
        )
    return steps


def check_manifest(folder: Path, step: int) -> list[str]:
    """Returns the differences of a step's folder from its manifest, one line each; empty where there are none."""
    try:
        manifest = json.loads(filesystem(folder).read(folder / MANIFEST))
        files = manifest["files"]
        sealed = manifest["sha256"] == _seal(manifest["step"], files) and manifest["step"] == step
    except StorageError:  # an outage, which says nothing of the step
        raise
    except OSError as e:
        return [f"{MANIFEST} can't be read ({e.strerror})"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return [f"{MANIFEST} is damaged"]
    if not sealed:
        return [f"{MANIFEST} is damaged, or is that of another step"]
    sizes = folder_files(folder)
    problems = [f"{name} is missing" for name in sorted(files.keys() - sizes.keys())]
    problems += [f"{name} should not be there" for name in sorted(sizes.keys() - files.keys())]
    for name in sorted(files.keys() & sizes.keys()):
        size, sha256 = files[name]
        try:
            if sizes[name] != size:
                problems.append(f"{name} has {sizes[name]} bytes, not {size}")
            elif file_sha256(folder / name) != sha256:
                problems.append(f"{name} has other contents than were written")
        except StorageError:
            raise
        except OSError as e:
            problems.append(f"{name} can't be read ({e.strerror})")
    return problems


def folder_files(folder: Path) -> dict[str, int]:
    """Size of every file below the folder but its manifest, by the path inside."""
    sizes = filesystem(folder).sizes(folder)
    sizes.pop(MANIFEST, None)
    return sizes


def _seal(step: int, files: dict) -> str:
    return hashlib.sha256(json.dumps([step, files], sort_keys=True).encode()).hexdigest()
