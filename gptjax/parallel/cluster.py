"""Cluster detection: the rank of this process from Slurm, TPU pods, Kubernetes JobSets, Open MPI or GPTJAX_* variables.

jax detects Slurm, TPU pods, Open MPI 4, and indexed Jobs where the kubernetes package is installed. Added here are
JobSets without rights to Kubernetes' API, and

    GPTJAX_COORDINATOR  host:port of process 0    GPTJAX_PROCESSES  how many there are    GPTJAX_PROCESS  0, 1, ...

each of which overrides a scheduler's value. With GPTJAX_PROCESSES=1 this process is alone.
"""

import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from gptjax.config.section import InputError, one_line

JOBSET_PORT = 8476


class RetryableError(Exception):
    """The processes could not connect this time; the same command may succeed later."""


class Cluster(NamedTuple):
    """A job of several processes, and the number of this one."""

    kind: str  # the source: "Slurm", "JobSet", "MPI", "TPU pod", ... or "GPTJAX_COORDINATOR"
    coordinator: str  # host:port of process 0
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None  # the numbers of this host's devices that this process uses; None: all
    hosts: int = 0  # 0: unknown

    @property
    def given(self) -> bool:
        """True where the user set the address, which waiting does not change."""
        return self.kind == "GPTJAX_COORDINATOR"


class _Detected(NamedTuple):
    """A scheduler's values; the address is a function, since finding it may use the network."""

    kind: str
    processes: int
    process: int
    coordinator: Any = None  # () -> str
    local_devices: tuple[int, ...] | None = None
    hosts: int = 0


def find_cluster(environment: Mapping[str, str] = os.environ, timeout: float = 300.0) -> Cluster | None:
    """The job that this process belongs to; None where it is alone. `timeout` is for a TPU's metadata, in seconds.

    Raises InputError where the variables are incomplete or no numbers.
    """
    address = environment.get("GPTJAX_COORDINATOR", "")
    processes, process = (_number(environment, name) for name in ("GPTJAX_PROCESSES", "GPTJAX_PROCESS"))
    if processes == 1:
        return None
    if processes is None or process is None:
        detected = _of_jobset(environment) or _by_jax(environment, timeout)
        if detected is None and (address or processes is not None or process is not None):
            raise InputError(
                f"GPTJAX_COORDINATOR={address!r}, GPTJAX_PROCESSES={processes}, GPTJAX_PROCESS={process}: no scheduler "
                "was found that gives the rest; set all three, or none"
            )
        if detected is None:
            _note_alone(environment)
            return None
        processes, process = (p if p is not None else q for p, q in zip((processes, process), detected[1:3]))
    else:
        detected = _Detected("GPTJAX_COORDINATOR", processes, process)
    if processes == 1:
        return None
    if not 0 <= process < processes:
        raise InputError(
            f"process {process} of {processes} ({detected.kind}): wanted a number from 0 to {processes - 1}"
        )
    kind, given = detected.kind, address or environment.get("JAX_COORDINATOR_ADDRESS", "")
    if given:
        kind = "GPTJAX_COORDINATOR"
    elif detected.coordinator is None:
        raise InputError(
            f"{processes} processes ({detected.kind}), but the address of process 0 is unknown; set GPTJAX_COORDINATOR "
            "to its host and a free port, e.g. GPTJAX_COORDINATOR=node1:12345, for all of them"
        )
    host, _, port = (given or detected.coordinator()).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"GPTJAX_COORDINATOR={given!r}: wanted host:port of process 0, e.g. node1:12345")
    return Cluster(kind, f"{host}:{port}", processes, process, detected.local_devices, detected.hosts)


def given_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """The number of this process as a launcher's variable gives it, asking nobody; None where there is none.

    It decides what is said before the processes meet, nothing else.
    """
    names = ("GPTJAX_PROCESS", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX", "TPU_WORKER_ID")
    numbers = [environment[name] for name in names if environment.get(name, "").isdecimal()]
    return int(numbers[0]) if numbers and environment.get("GPTJAX_PROCESSES") != "1" else None


def _of_jobset(environment: Mapping[str, str]) -> _Detected | None:
    """Reads the variables that a JobSet's template fills with the downward API; see launch/gke_jobset.yaml.

    JOBSET_NAME, REPLICATED_JOB_NAME, PROCESSES_IN_JOB, JOB_COMPLETION_INDEX (Kubernetes sets it), and for several
    replicas of the job REPLICATED_JOB_REPLICAS and JOB_INDEX. The pod of process 0 has a name in the JobSet's headless
    service.
    """
    names = ("JOBSET_NAME", "REPLICATED_JOB_NAME", "JOB_COMPLETION_INDEX")
    if not all(environment.get(name) for name in names) or _on_tpu():
        return None  # on a TPU jax reads Google's own variables
    jobset, job = environment["JOBSET_NAME"], environment["REPLICATED_JOB_NAME"]
    in_job = _number(environment, "PROCESSES_IN_JOB")
    if in_job is None:
        raise InputError("JOBSET_NAME is set but PROCESSES_IN_JOB is not; set it to the parallelism of the job")
    index, replicas = (_number(environment, n) or 0 for n in ("JOB_INDEX", "REPLICATED_JOB_REPLICAS"))
    number = _number(environment, "JOB_COMPLETION_INDEX") or 0
    port = environment.get("JAX_COORDINATOR_PORT") or JOBSET_PORT
    return _Detected(
        "JobSet", in_job * max(1, replicas), index * in_job + number,
        coordinator=lambda: f"{jobset}-{job}-0-0.{jobset}:{port}",
    )  # fmt: skip


_KINDS = {"slurm": "Slurm", "ompi": "MPI", "gcetpu": "TPU pod", "gketpu": "TPU pod", "": "Kubernetes"}


def _by_jax(environment: Mapping[str, str], timeout: float) -> _Detected | None:
    """Asks jax's own detection."""
    from jax._src import clusters

    for cls in clusters.ClusterEnv._cluster_types:
        # Kubernetes only in indexed jobs: a notebook in a pod is alone, and has no right to its API.
        in_kubernetes = cls is clusters.K8sCluster
        if cls.opt_in_only_method or (in_kubernetes and "JOB_COMPLETION_INDEX" not in environment):
            continue
        kind = _KINDS.get(cls.name, cls.name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a missing package is reported below, in one line
                if not cls.is_env_present():
                    if in_kubernetes and "KUBERNETES_SERVICE_HOST" in environment:
                        raise InputError(
                            "JOB_COMPLETION_INDEX is set, but JOBSET_NAME is not, and the package kubernetes is "
                            "missing; set GPTJAX_COORDINATOR, GPTJAX_PROCESSES and GPTJAX_PROCESS, or install jax[k8s]"
                        )
                    continue
            processes, process = cls.get_process_count(), cls.get_process_id()
            local = cls.get_local_process_id()
        except InputError:
            raise
        except Exception as e:  # whatever a cloud's client raises
            raise InputError(
                f"{kind}: jax can't find the number of this process ({one_line(e, 200)}); set "
                "GPTJAX_COORDINATOR, GPTJAX_PROCESSES and GPTJAX_PROCESS, or GPTJAX_PROCESSES=1 for one process"
            ) from e
        port, seconds = environment.get("JAX_COORDINATOR_PORT"), int(timeout)
        hosts = _number(environment, "SLURM_STEP_NUM_NODES") or 0 if kind == "Slurm" else 0
        here = processes // hosts if hosts else 0
        return _Detected(
            kind, processes, process,
            coordinator=lambda c=cls, p=port, s=seconds: c.get_coordinator_address(
                timeout_secs=s, override_coordinator_port=p
            ),
            local_devices=None if kind == "TPU pod" else _own_device(environment, local, here),
            hosts=hosts,
        )  # fmt: skip
    return None


def _own_device(environment: Mapping[str, str], local: int | None, here: int) -> tuple[int, ...] | None:
    """The GPU of process `local` of `here` (0: unknown) on this host; None where all visible GPUs are its own."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES", ""))
    alone = here == 1 or len(visible.split(",")) == 1 and visible != ""
    return None if local is None or alone else (local,)


def _on_tpu() -> bool:
    import jax  # noqa: F401  (importing it looks for the chips)
    from jax._src import cloud_tpu_init

    return cloud_tpu_init.running_in_cloud_tpu_vm


def _note_alone(environment: Mapping[str, str]) -> None:
    """Prints a note where a launcher seems to have started several processes, which this one can't find."""
    tasks = environment.get("SLURM_NTASKS", "1")
    count = environment.get("PMI_SIZE") or environment.get("OMPI_COMM_WORLD_SIZE", "1")
    if environment.get("SLURM_JOB_ID") and tasks != "1" and "SLURM_STEP_NODELIST" not in environment:
        note = f"Slurm's job has {tasks} tasks, but this process was not started by srun"
    elif count != "1":
        note = f"MPI started {count} processes; set GPTJAX_COORDINATOR, GPTJAX_PROCESSES and GPTJAX_PROCESS in each"
    else:
        return
    print(f"note: {note}: it trains alone", file=sys.stderr, flush=True)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    if value and not value.isdecimal():
        raise InputError(f"{name}={value!r}: wanted a whole number")
    return int(value) if value else None
