"""Manifests of checkpoints: the steps that are committed, and the size and sha256 of each of their files. No jax."""

import hashlib
import json
import re
from pathlib import Path

from gptjax.config.section import InputError
from gptjax.storage import StorageError, file_sha256, filesystem

MANIFEST, PENDING = "manifest.json", ".orbax-pending"


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
