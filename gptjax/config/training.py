"""Settings of a whole run: optimizer, mesh, checkpoints, evaluations, and what may change when it is resumed."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from gptjax.config.data import DataConfig
from gptjax.config.generation import GenerateConfig
from gptjax.config.model import ModelConfig
from gptjax.config.section import InputError, Section, leaves
from gptjax.config.tokenizer import TokenizerConfig

SCHEMA = 1  # version of config.json; raise it when a saved file needs translating

# What may change when a run is resumed without a change of its numbers, but for rounding.
FREE = ("run_dir", "log_every", "log_norms_every", "sinks", "sample", "profile", "compile_cache", "time_limit",
        "mesh", "checkpoint", "evaluate", "generate", "model.remat", "model.remat_names", "model.unroll",
        "model.attention", "model.attention_block", "data.workers", "data.validation", "data.max_corrupt",
        "data.exact_resume", "tokenizer.template")  # fmt: skip
# What may change, and changes the curve from there on. Everything else is frozen: it would make another run.
CHANGEABLE = {
    "steps": "the schedule changes with it",
    "epochs": "the steps and the schedule change with it",
    "data.batch_size": "the data go on with the next row; the schedule counts steps, as before",
    "optim.accumulate": "",
    "optim.learning_rate": "",
    "optim.schedule": "",
    "optim.warmup_steps": "",
    "optim.final_fraction": "",
    "optim.decay_fraction": "",
    "optim.weight_decay": "",
    "optim.clip_norm": "",
}
"""By name, the consequence that the user is told."""
# Compared by what they are, not by how they are spelt: a corpus may be moved, and the data refuses another one.
BY_CONTENT = ("data.source", "data.mixture", "tokenizer.path", "rewards.sources", "value.init", "ptx.source")

SINKS = ("tensorboard", "wandb", "trackio", "mlflow")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """The optimizer and its schedule."""

    section: ClassVar[str] = "optim"

    kind: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    """AdamW; Lion; Adafactor (factored second moments); Muon for the layers' matrices with AdamW for the rest."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "linear", "constant", "rsqrt"] = "cosine"
    """After warm-up: half a cosine; constant with a straight decay at the end (warm-up, stable, decay); a straight
    decay; constant; or falling as 1 / sqrt(step)."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a share of the peak (cosine, linear, wsd)."""
    decay_fraction: float = 0.2
    """Share of the steps in which wsd decays."""
    beta1: float = 0.9
    """Decay of the first moment; Adafactor with 0 keeps none, and hardly any state."""
    beta2: float = 0.95
    """Decay of the second moment; Adafactor's highest; Lion's for its momentum, which beta1 mixes with the gradient."""
    epsilon: float = 1e-8
    """Added to the root of the second moment, which Lion does not have."""
    momentum: float = 0.95
    """Decay of Muon's momentum."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which evaluation and generation then use; 0: none."""
    z_loss: float = 0.0
    """Weight of log(Z)^2 in the loss, which keeps the softmax's normaliser Z near 1 (PaLM)."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and the position table have none."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    accumulate: int = 1
    """Micro-batches that one step runs in turn; data.batch_size is divided by it."""

    def decay_steps(self, steps: int) -> float:
        """Steps at the end of a run of `steps` over which wsd decays."""
        return max(steps * self.decay_fraction, 1)

    def __post_init__(self):
        self.require_positive("learning_rate", "epsilon", "accumulate")
        self.require_numbers(0, 2**31 - 1, "warmup_steps")
        self.require_numbers(0, math.inf, "weight_decay", "clip_norm", "z_loss")
        self.require_numbers(0, 1, "final_fraction", "decay_fraction")
        for name in ("beta1", "beta2", "momentum", "ema"):
            self.require(0 <= getattr(self, name) < 1, name, "from 0 up to, not including, 1")


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Devices along each axis of the mesh; one size may be -1: all that are left."""

    section: ClassVar[str] = "mesh"

    data: int = -1
    """Copies of the model, each with its own rows."""
    fsdp: int = 1
    """Devices that share parameters, optimizer state and rows."""
    tensor: int = 1
    """Devices that share heads, MLP width and vocabulary."""
    context: int = 1
    """Devices that share the length of each row."""
    slices: int = 1
    """Slices (or nodes) joined by a slower network, over which the data axis alone is cut."""

    def __post_init__(self):
        sizes = self.sizes
        for name, size in sizes.items():
            self.require(size == -1 or size >= 1, name, "a number of devices, or -1 for all that are left")
        self.require(list(sizes.values()).count(-1) <= 1, "data", "at most one mesh size of -1")
        self.require(self.slices >= 1, "slices", "at least 1")
        cut = self.data == -1 or self.data % self.slices == 0
        self.require(cut, "data", f"a multiple of mesh.slices={self.slices}, over which it is cut")

    @property
    def sizes(self) -> dict[str, int]:
        """The configured size of each axis, by name."""
        return {axis: size for axis, size in dataclasses.asdict(self).items() if axis != "slices"}

    def filled(self, count: int) -> dict[str, int]:
        """The size of each axis with -1 filled in for `count` devices; the sizes may still not cover them."""
        left = max(1, count // math.prod(n for n in self.sizes.values() if n != -1))
        return {axis: left if n == -1 else n for axis, n in self.sizes.items()}

    def covering(self, count: int) -> dict[str, int]:
        """The size of each axis on `count` devices; raises InputError where the sizes do not cover them."""
        sizes = self.filled(count)
        if math.prod(sizes.values()) != count:
            raise InputError(
                f"{', '.join(f'mesh.{axis}={n}' for axis, n in self.sizes.items())} does not cover the {count} "
                f"device(s) here; make the product of the sizes {count}, or set one of them to -1"
            )
        return sizes


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Times of saves, and the checkpoints that are kept."""

    section: ClassVar[str] = "checkpoint"

    every: int = 500
    """Steps between saves; the last step is always saved."""
    at: tuple[int, ...] = ()
    """Also save, and keep, these steps."""
    keep_newest: int = 2
    """Newest checkpoints kept; at least 1."""
    keep_every: int = 0
    """Also keep each checkpoint whose step is a multiple of this; 0: none."""
    keep_best: int = 0
    """Also keep this many of the lowest evaluation loss."""
    export_every: int = 0
    """Steps between exports (as by `gptjax export`) into the run's exports/step_N, with one of the last step; a
    multiple of `every`, 0: none."""

    def __post_init__(self):
        self.require_positive("every", "keep_newest")
        self.require_numbers(0, math.inf, "keep_every", "keep_best", "export_every")
        saved = self.export_every % self.every == 0
        self.require(saved, "export_every", f"a multiple of checkpoint.every={self.every}")
        self.require(all(step > 0 for step in self.at), "at", "steps above 0")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Section):
    """Times and rows of the evaluations on the validation split, and tasks that are evaluated with them."""

    section: ClassVar[str] = "evaluate"

    every: int = 500
    """Steps between evaluations; the last step is always evaluated."""
    max_rows: int = 0
    """Rows of the validation split to use, from its start; 0: all of them, of a streamed source the first 1,024."""
    tasks: tuple[str, ...] = ()
    """Task files to evaluate as well, each as FILE or FILE:SETTING=VALUE:..., as in `gptjax eval --tasks`."""
    limit: int = 0
    """Items of each task to use, from its start; 0: all."""
    patience: int = 0
    """Evaluations in a row without a new lowest eval_loss that end the run before `steps`; 0: none do."""

    def __post_init__(self):
        self.require_positive("every")
        self.require_numbers(0, math.inf, "max_rows", "limit", "patience")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Evaluate a run on its validation split, with --tasks on files of questions and texts, or --against another."""

    tasks: tuple[str, ...] = ()
    """Task files, each as FILE or as FILE:SETTING=VALUE:... with settings that replace those of the file's head
    (quiz.jsonl:shots=5); a .txt is a task, too. None: the run's own validation split."""
    limit: int = 0
    """Items of each task, or prompts, to use, from its start; 0: all."""
    seed: int = 0
    """Seed by which the examples in front of an item are drawn, or with --against the answers."""
    json: str = ""
    """File for the tasks' numbers."""
    items: str = ""
    """File for what came of each item, a JSON object a line: the texts scored, their log-probabilities, the choice."""
    chat: bool = False
    """Give each prompt as a message of a user, through the run's chat template, and score or read the answer to it."""
    template: str = ""
    """Chat template to use instead of the run's."""
    against: str = ""
    """Run whose answers to the same prompts are compared with this one's: the win rate by the scores of a judge."""
    judge: str = ""
    """Run by gptjax reward that scores the answers."""
    prompts: str = ""
    """File of prompts, as gptjax grpo reads them, that both runs answer."""
    max_new_tokens: int = 128
    """Tokens of an answer at the most, with --against."""
    batch_tokens: int = 2048
    """Tokens of tasks that each device computes at once."""
    step: int = 0
    """Checkpoint to use; 0: the newest."""
    max_rows: int = 0
    """Rows of the validation split to use, from its start; 0: all of them, of a streamed source the first 1,024."""
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        self.require_numbers(0, math.inf, "step", "max_rows", "limit", "seed")
        self.require_positive("batch_tokens", "max_new_tokens")
        for name in ("limit", "json", "items", "chat"):
            beside = bool(self.tasks) or (name == "limit" and bool(self.against))
            self.require(beside or not getattr(self, name), name, "--tasks beside it")
        for name in ("judge", "prompts"):
            self.require(bool(getattr(self, name)) == bool(self.against), name, "all of --against, --judge, --prompts")
        self.require(not self.against or not self.tasks, "against", "none with --tasks")
        self.require(self.chat or not self.template, "template", "none without --chat")
        self.require(not self.tasks or not self.max_rows, "max_rows", "0 with --tasks", "use --limit")


@dataclass(frozen=True, kw_only=True)
class ImportConfig(Section):
    """Make a run of weights from elsewhere; unless told otherwise, each device holds a part of them."""

    template: str = ""
    """The chat template's name, such as chatml or llama3; empty: the source's, where that is known."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1, fsdp=-1))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Pretraining from start to end."""

    stage: ClassVar[str] = "pretrain"
    LEAST_STEPS: ClassVar[int] = 1

    run_dir: str = "runs/unnamed"
    """Folder of the run, also as gs://BUCKET/FOLDER or s3://BUCKET/FOLDER; the same command on it resumes."""
    steps: int = 1000
    """Training steps; may be raised to go on with a finished run."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and dropout."""
    init: str = ""
    """Run whose weights to start from, with a schedule of its own; a longer context or more token ids are allowed."""
    loss: str = ""
    """Function module:name that builds the loss from the decoder, in place of next-token cross-entropy."""
    log_norms_every: int = 0
    """Steps between lines with the norms of each layer's gradients and activations; 0: never."""
    log_every: int = 10
    """Steps between printed lines where there is no terminal for a progress bar; metrics.jsonl has every step."""
    sinks: tuple[str, ...] = ("tensorboard",)
    """Where curves go beside metrics.jsonl and report.html: tensorboard, wandb, trackio, mlflow, or module:function."""
    sample: bool = True
    """Continue generate.prompt at each evaluation, for the report, and print the text at the end."""
    time_limit: str = ""
    """Save and end before this much time has passed since the start (4h, 90m, 1:30:00, seconds), with exit code 75."""
    profile: str = ""
    """Steps to trace, as FIRST:LAST (10:15); the trace goes to the run folder."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that the next start is faster."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    def __post_init__(self):
        self.require(bool(self.run_dir), "run_dir", "a folder")
        self.require_numbers(self.LEAST_STEPS, 2**31 - 1, "steps")
        self.require_positive("log_every")
        self.require_numbers(0, 2**31 - 1, "seed")
        self.require_numbers(0, math.inf, "log_norms_every")
        wanted = f"{', '.join(SINKS)}, or module:function, each once"
        self.require(all(s in SINKS or ":" in s for s in self.sinks), "sinks", wanted)
        self.require(len({*self.sinks}) == len(self.sinks), "sinks", wanted)
        if self.data.batch_size % self.optim.accumulate:
            rows, parts = self.data.batch_size, self.optim.accumulate
            raise InputError(
                f"data.batch_size={rows} is not divisible by optim.accumulate={parts}; "
                f"e.g. --data.batch-size {parts * max(1, rows // parts)}"
            )
        if self.time_limit:
            wanted = "a time above 0 such as 4h, 1h30m, 90m, 1:30:00, 2-12:00:00 (days), or a number of seconds"
            self.require(self.time_limit_seconds > 0, "time_limit", wanted)
        if self.profile:
            first, _ = self.profile_steps or (0, 0)
            self.require(first > 0, "profile", "FIRST:LAST with 1 <= FIRST <= LAST, e.g. 10:15")
            self.require(first <= self.steps or not self.steps, "profile", f"a FIRST of at most steps={self.steps}")

    @property
    def updates(self) -> int:
        """Updates of the run, over which the schedule goes: one a step."""
        return self.steps

    def with_dtype(self, dtype: str) -> "TrainConfig":
        """These settings with another model.dtype."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, dtype=dtype))

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that a run has beside the language model's: see `model.heads`."""
        return ()

    @property
    def time_limit_seconds(self) -> float:
        """`time_limit` in seconds; 0 where it is empty or malformed."""
        unit = r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?"
        clock = r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)"  # as Slurm writes it
        match = re.fullmatch(unit, self.time_limit) or re.fullmatch(clock, self.time_limit)
        parts = [int(x or 0) for x in match.groups()] if match else []
        return float(sum(x * seconds for x, seconds in zip(parts, (86400, 3600, 60, 1))))

    @property
    def profile_steps(self) -> tuple[int, int] | tuple[()]:
        """First and last step to trace; empty where `profile` is empty or malformed."""
        first, _, last = self.profile.partition(":")
        if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
            return int(first), int(last)
        return ()


def check_divisible(config: TrainConfig, sizes: Mapping[str, int]) -> None:
    """Raises InputError where the rows or their length do not divide over the axes of a mesh (mesh.shape)."""
    shards, parts = sizes["data"] * sizes["fsdp"], config.optim.accumulate
    if config.data.batch_size % (shards * parts):
        raise InputError(
            f"data.batch_size={config.data.batch_size} does not divide over mesh.data x mesh.fsdp = {shards} and "
            f"optim.accumulate={parts}; e.g. --data.batch-size {shards * parts}"
        )
    shared, length = sizes["context"], config.data.length
    if shared > 1 and length % (2 * shared):
        raise InputError(
            f"data.length={length} does not divide into two chunks for each of the mesh.context={shared} devices that "
            f"share a row; e.g. --data.length {max(1, length // (2 * shared)) * 2 * shared}"
        )


def defining_settings(config: Any) -> dict[str, Any]:
    """The settings, by dotted name, that a run's numbers follow from: all that are not FREE."""
    return {n: v for n, v in leaves(config) if not any(n == f or n.startswith(f"{f}.") for f in FREE)}


def frozen_settings(config: Any) -> dict[str, Any]:
    """The settings, by dotted name, that may not change on resume."""
    return {n: v for n, v in defining_settings(config).items() if n not in CHANGEABLE}


def frozen_changes(old: Any, new: Any) -> list[str]:
    """Names what differs between a run's settings and new ones and may not change on resume."""
    before = dict(leaves(old))
    names = [n for n in frozen_settings(new) if n not in BY_CONTENT]
    after = dict(leaves(new))
    return [f"{n} was {before[n]!r}, got {after[n]!r}" for n in names if after[n] != before[n]]
