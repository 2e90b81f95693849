"""Settings of the stages that begin from a run: its weights, all or by low-rank adaptation, on records in files."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from gptjax.config.data import DataConfig
from gptjax.config.section import Section
from gptjax.config.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """Low-rank adaptation (Hu et al. 2021): weights W + alpha / rank x a b, of which a and b alone are trained."""

    section: ClassVar[str] = "lora"

    rank: int = 0
    """Rank of the products that are added to the weights; 0: none, all weights are trained."""
    alpha: float = 32.0
    """Scale of the products: they are added times alpha / rank."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "w_in", "w_gate", "w_out")
    """Matrices of the layers that get one, by the names before their letters; those that a model lacks are left out."""

    @property
    def scale(self) -> float:
        """Factor of the product a b."""
        return self.alpha / self.rank

    def __post_init__(self):
        self.require_numbers(0, 2**31 - 1, "rank")
        self.require_positive("alpha")
        known = {"q", "k", "v", "o", "w_in", "w_gate", "w_out"}
        self.require(
            len(self.targets) > 0 and set(self.targets) <= known, "targets", f"some of {', '.join(sorted(known))}"
        )


SCRATCH = "scratch"  # as `init`: no run, but random weights


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainConfig):
    """Training that begins from the run in `init`, whose model and tokenizer it has.

    Of `model` dropout, dtype, attention, attention_block, remat, remat_names and unroll are its own, of `tokenizer` the
    template; data.source is a file of records, or a folder of them.
    """

    stage: ClassVar[str] = ""
    RECORDS: ClassVar[str] = "records"
    LEAST_STEPS: ClassVar[int] = 0

    steps: int = 0
    """Training steps; 0: those of `epochs`."""
    epochs: float = 1.0
    """Passes over the records that are trained on, where `steps` is 0."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def from_scratch(self) -> bool:
        """True where training begins from random weights, with the model and tokenizer of these settings."""
        return self.init == SCRATCH

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("epochs")
        if self.from_scratch:
            self.require(self.stage == "sft", "init", f"a run with gptjax {self.stage}; {SCRATCH} is for gptjax sft")
            self.lora.require(not self.lora.rank, "rank", f"0 with init={SCRATCH}, which has no weights to adapt")
            ready = self.tokenizer.kind == "bytes" or bool(self.tokenizer.path)
            then = "or --tokenizer.kind bytes --tokenizer.vocab-size 258"
            self.tokenizer.require(ready, "path", f"a tokenizer that is made already with init={SCRATCH}", then)
        for f in dataclasses.fields(DataConfig):
            value = getattr(self.data, f.name)
            ours = f.name in ("source", "batch_size", "length", "validation_fraction")
            self.data.require(ours or value == f.default, f.name, f"{f.default!r} with gptjax {self.stage}")


@dataclass(frozen=True, kw_only=True)
class SftConfig(TuneConfig):
    """Supervised fine-tuning of the run in `init` on conversations, whose model and tokenizer it has.

    Of `model` dropout, dtype, attention, attention_block, remat, remat_names and unroll are its own, and vision where
    that run reads no images, of `tokenizer` the template; data.source is a file of conversations, or a folder of them.
    With --init scratch the weights are random, and model and tokenizer those of the settings.
    """

    stage: ClassVar[str] = "sft"
    RECORDS: ClassVar[str] = "conversations"

    epochs: float = 16.0
    """Passes over the conversations that are trained on, where `steps` is 0."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TuneConfig):
    """Training of a reward model on preferences, from the run in `init`, whose model and tokenizer it has.

    Of `model` dtype, attention, attention_block, remat, remat_names and unroll are its own, of `tokenizer` the
    template; data.source is a file of preferences, or a folder of them. A row of data.length tokens holds a prompt and
    all of its answers.
    """

    stage: ClassVar[str] = "reward"
    RECORDS: ClassVar[str] = "preferences"

    demonstrations: str = ""
    """Conversations whose answers score 0 on average in the end; none: the best answers that are trained on."""

    @property
    def heads(self) -> tuple[str, ...]:
        """The head that scores."""
        return ("score_D",)

    def __post_init__(self):
        super().__post_init__()
        self.model.require(self.model.dropout == 0, "dropout", f"0 with gptjax {self.stage}")


@dataclass(frozen=True, kw_only=True)
class DpoConfig(TuneConfig):
    """Direct preference optimisation of the run in `init`: a policy from preferences, without a reward model.

    Of `model` dtype, attention, attention_block, remat, remat_names and unroll are its own, of `tokenizer` the
    template; data.source is a file of preferences, or a folder of them. The reference policy is `init` as it was.
    """

    stage: ClassVar[str] = "dpo"
    RECORDS: ClassVar[str] = "preferences"

    kind: Literal["dpo", "ipo"] = "dpo"
    """Loss: -log sigmoid of the margin of implicit rewards (DPO), or its squared distance from a finite one (IPO)."""
    beta: float = 0.1
    """Weight of the KL to the reference policy, in the reward that the policy stands for; IPO's tau."""

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("beta")
        self.require(not self.loss, "loss", "none with gptjax dpo, which has its own", "see --kind")
        self.optim.require(not self.optim.z_loss, "z_loss", "0 with gptjax dpo")
        self.model.require(not self.model.dropout, "dropout", "0 with gptjax dpo: the policy begins as its reference")


@dataclass(frozen=True, kw_only=True)
class RewardsConfig(Section):
    """Sources of the reward of an answer, which is the sum of what they give, each times its weight."""

    section: ClassVar[str] = "rewards"

    sources: tuple[str, ...] = ()
    """Functions module:function, or folders of runs by gptjax reward; each as NAME=SOURCE where there are several."""
    weights: tuple[float, ...] = ()
    """One factor for each source, which may be below 0; none: 1 each."""
    unfinished: Literal["fixed", "scored"] = "fixed"
    """Reward of an answer that was cut off: the fixed one below, or what the sources give it."""
    fixed: float = -1.0
    """Reward of an answer that was cut off; it should lie below the usual one."""

    def __post_init__(self):
        entries = self.by_name
        named = len(entries) == len(self.sources) and all(entries.values())
        several = len(self.sources) > 1 and not all(entries)
        self.require(named and not several, "sources", "NAME=SOURCE entries whose names differ, or one SOURCE")
        given = not self.weights or len(self.weights) == len(self.sources)
        self.require(given, "weights", f"one for each of the {len(self.sources)} sources in rewards.sources")
        self.require(all(math.isfinite(w) and w for w in self.weights), "weights", "finite numbers other than 0")
        self.require(math.isfinite(self.fixed), "fixed", "a finite number")

    @property
    def by_name(self) -> dict[str, str]:
        """The sources by name, in their order; one that stands without a name has the empty one."""
        pairs = [(entry, *entry.partition("=")) for entry in self.sources]
        return {name if sign and name.isidentifier() else "": source if sign and name.isidentifier() else entry
                for entry, name, sign, source in pairs}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Section):
    """Answers drawn in a step, data.batch_size in all, and the updates that are made on them."""

    section: ClassVar[str] = "rollout"

    answers: int = 8
    """Answers to each prompt; a step draws data.batch_size / answers prompts."""
    max_new_tokens: int = 128
    """Tokens of an answer at the most; one that has not ended by then is cut off."""
    temperature: float = 1.0
    """Divides the logits of the policy and of the reference, when answers are drawn and in every log-probability."""
    epochs: int = 1
    """Passes over the answers of a step, which are shuffled before each but the first."""
    minibatches: int = 1
    """Updates in each of these passes; in the first each is made on its share of the answers to every prompt."""

    def __post_init__(self):
        self.require_positive("answers", "max_new_tokens", "temperature", "epochs", "minibatches")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(TuneConfig):
    """Training of the policy in `init` on rewards of answers that it draws itself.

    data.source holds prompts, and whatever a reward reads beside them; data.batch_size counts the answers of a step.
    """

    RECORDS: ClassVar[str] = "prompts"

    beta: float = 0.05
    """Weight of the KL to the reference, which is the policy in `init`: reward a nat."""
    clip: float = 0.2
    """Bound of an update: where a token's ratio to the policy that drew it leaves 1 - clip to 1 + clip, it is cut."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)

    def __post_init__(self):
        super().__post_init__()
        self.require_numbers(0, math.inf, "beta")
        self.require_positive("clip")
        rows, rollout = self.data.batch_size, self.rollout
        parts = {"rollout.answers": rollout.answers, "rollout.minibatches x optim.accumulate": (
            rollout.minibatches * self.optim.accumulate
        )}  # fmt: skip
        for name, n in parts.items():
            self.data.require(rows % n == 0, "batch_size", f"a multiple of {name} = {n}")
        most = self.data.length - 1
        rollout.require(
            rollout.max_new_tokens < self.data.length, "max_new_tokens", f"at most data.length - 1 = {most}"
        )

    @property
    def updates(self) -> int:
        return self.steps * self.rollout.epochs * self.rollout.minibatches


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(PolicyConfig):
    """Group-relative policy optimization of the policy in `init`: rewards of several answers to each prompt.

    data.source holds prompts, and whatever a reward reads beside them; data.batch_size counts the answers of a step.
    """

    stage: ClassVar[str] = "grpo"

    estimator: Literal["rloo", "grpo", "dr_grpo"] = "rloo"
    """rloo: leave-one-out baseline, the KL in the reward; it converges to ref exp(r / beta) / Z, the optimum of
    E[r] - beta KL(pi || ref). grpo, as published: z-scores, k3 in the loss; not to that optimum, and below some beta it
    collapses to one answer. dr_grpo: group means, k3 in the loss; to b ref / (lambda - r), b = beta G / (G - 1)."""

    def __post_init__(self):
        super().__post_init__()
        self.rollout.require(self.rollout.answers > 1, "answers", "at least 2 with gptjax grpo, which compares them")


@dataclass(frozen=True, kw_only=True)
class ValueConfig(Section):
    """The value function of PPO, which predicts the reward of an answer from each of its beginnings."""

    section: ClassVar[str] = "value"

    init: str = ""
    """Run by gptjax reward whose model it begins as; empty: the weights of the policy's `init`, and a value of 0."""
    rank: int = 16
    """Rank of LoRA leaves of its own beside the weights that it begins from; 0: it reads the policy's states."""
    alpha: float = 32.0
    """Scale of the products: they are added times alpha / rank."""
    weight: float = 0.1
    """Factor of the value loss."""
    clip: float = 0.2
    """Most that a value moves in the updates on one rollout before its loss stops falling."""

    def __post_init__(self):
        self.require_numbers(0, 2**31 - 1, "rank")
        self.require_positive("alpha", "weight", "clip")
        self.require(self.rank > 0 or not self.init, "init", "none with value.rank=0, since it has no trunk of its own")

    @property
    def lora(self) -> LoraConfig:
        """Settings of its own leaves."""
        return LoraConfig(rank=self.rank, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class PtxConfig(Section):
    """Pretraining text whose language-model loss is added to PPO's (PPO-ptx)."""

    section: ClassVar[str] = "ptx"

    source: str = ""
    """A text, a prepared folder, or init: the data of the pretrained run that `init` goes back to; empty: none."""
    weight: float = 27.8
    """Factor of its loss; 0: its loss is measured at evaluations, and not trained on."""

    def __post_init__(self):
        self.require_numbers(0, math.inf, "weight")


@dataclass(frozen=True, kw_only=True)
class PpoConfig(PolicyConfig):
    """Proximal policy optimization of the policy in `init`: rewards of its answers, against a value function.

    data.source holds prompts, and whatever a reward reads beside them; data.batch_size counts the answers of a step.
    """

    stage: ClassVar[str] = "ppo"

    beta: float = 0.02
    """Weight of the KL to the reference, which is the policy in `init`: reward a nat."""
    target_kl: float = 0.0
    """KL, in nats an answer, that beta is adapted to reach, by at most 20 % in `horizon` answers; 0: beta is fixed."""
    horizon: int = 10_000
    """Answers in which beta may change by 20 %, where target_kl is given."""
    gamma: float = 1.0
    """Factor of what a token later is worth."""
    lam: float = 0.95
    """Mixes values into advantages: 1 uses the rewards of the whole answer, 0 the value of the next token alone."""
    whiten_rewards: bool = False
    """Divide the tokens' rewards by their standard deviation over the step."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of a step to mean 0 and standard deviation 1."""
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(answers=1))
    value: ValueConfig = field(default_factory=ValueConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)

    def __post_init__(self):
        super().__post_init__()
        self.require_numbers(0, math.inf, "target_kl")
        self.require_positive("horizon")
        self.require_numbers(0, 1, "gamma", "lam")
        self.require(not self.target_kl or self.beta > 0, "beta", "above 0 where target_kl is given: it is multiplied")
        self.model.require(not self.model.dropout, "dropout", "0 with gptjax ppo: ratios of the policy would be random")

    @property
    def heads(self) -> tuple[str, ...]:
        """The value function's, among what a run's weights have beside the language model's."""
        return ("value_D", *(("value",) if self.value.rank else ()))


STAGES: dict[str, type[TrainConfig]] = {
    cls.stage: cls for cls in (TrainConfig, SftConfig, RewardConfig, DpoConfig, GrpoConfig, PpoConfig)
}
"""The settings of each stage, by the name of its function in a recipe and of its stage in a run's config.json."""
