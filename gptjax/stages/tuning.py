"""The model of a stage that begins from a run: its state, all weights or LoRA's leaves, and what stays frozen."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.config import TuneConfig
from gptjax.data.batches import DataState
from gptjax.data.pipeline import DataPipeline
from gptjax.generation.chat import stream_answers
from gptjax.model.decoder import Decoder, Params, init_params
from gptjax.model.heads import init_heads
from gptjax.model.lora import join_lora, merge_lora
from gptjax.parallel.processes import barrier, main_process_first, say, working
from gptjax.parallel.sharding import abstract, shardings
from gptjax.runs.digest import tree_sha256
from gptjax.runs.init_check import check_init
from gptjax.runs.load import check_base
from gptjax.runs.manifest import committed_steps
from gptjax.runs.run import Run
from gptjax.runs.warm_start import load_base, warm_start
from gptjax.stages.runner import Runner, once_a_step, print_sample, sample_settings
from gptjax.tokenizer import Tokenizer
from gptjax.tokenizer.known_templates import template_of
from gptjax.training.build import build_components
from gptjax.training.step import Beside, LossFn, TrainState, compile_step, init_state


@contextlib.contextmanager
def reading(config: TuneConfig, records: str) -> Generator[tuple[Run, bool]]:
    """(the run in config.run_dir, True where it was begun), while its data is read: by the main process first.

    The tokenizer of the run, or else of the one in config.init, is here then. Raises InputError where config.init, from
    which a new one begins, is no run with a checkpoint or its weights would mean something else.
    """
    run = Run.at(config.run_dir)
    resumes = bool(committed_steps(run.checkpoints))
    if not resumes and not config.from_scratch:
        check_init(config)
    with main_process_first("data"), working(records):
        if resumes or not config.from_scratch:
            source = run if resumes else Run.existing(config.init)
            source.pull(source.tokenizer)
        yield run, resumes


class Tuning:
    """The model of the run in config.init under training: functions and shapes alone until `begin`.

    The state holds all of its weights, or with config.lora the leaves beside them, and config.heads. What `frozen`
    holds lies on the mesh, is not donated and never saved: frozen["base"], the weights of config.init as they were,
    where LoRA needs them or `reference` asks for them. So the reference policy of every stage is frozen["base"]. `loss`
    builds the loss from the decoder, None the language model's (or the user's own); it is given whole weights, with
    LoRA joined ones; so is a loss `beside` it.
    """

    def __init__(
        self,
        config: TuneConfig,
        mesh: Mesh,
        loss: Callable[[Decoder], LossFn] | None = None,
        *,
        reference: bool = False,
        beside: Callable[[Decoder], Beside] | None = None,
    ):
        self.config, self.mesh = config, mesh
        self.adapts = config.lora.rank > 0
        self.passes = 2.0 if self.adapts else 3.0
        """The products of an update, in forward passes: with LoRA the base's weights have no gradient of their own."""
        self.keeps_base = self.adapts or reference
        lora = config.lora if self.adapts else None
        self.decoder, self.tx, self._init, self.step = build_components(config, lora, loss, beside)
        self.shapes: TrainState = abstract(jax.eval_shape(self._init, 0), mesh)
        """The state's shapes, with their shardings."""
        self.weight_shapes: Params = abstract(jax.eval_shape(init_params(self.decoder), jax.random.key(0)), mesh)
        """The shapes of the model's weights, with their shardings."""
        self.frozen_shapes: dict[str, Params] = {"base": self.weight_shapes} if self.keeps_base else {}
        self._base: Params = {}
        self._merged: tuple[Params, Params] | None = None
        heads = abstract(jax.eval_shape(init_heads(config.heads, config), jax.random.key(0)), mesh)
        self.whole_shapes: Params = self.weight_shapes | heads
        """The shapes of what `whole` returns: the model's weights, and the heads beside them."""
        self._merge = jax.jit(merge_lora, out_shardings=shardings(self.whole_shapes, mesh))

    def begin(self, runner: Runner, data: DataPipeline) -> tuple[TrainState, DataState, dict[str, Params]]:
        """(state, state of the data, frozen) of the newest checkpoint, else those of the run in config.init, if any.

        With a base the data's state names its step and digest in "base", and so do all that follow from it. Raises
        InputError where the data or the base are not what they were, and where config.init does not fit the settings.
        """
        config, mesh = self.config, self.mesh
        restored = runner.restore(self.shapes)
        if restored is not None:
            state, cursor = restored
            data.check(cursor)
        else:
            with working("making the first weights"):
                state, cursor = jax.block_until_ready(init_state(self._init, config.seed, mesh)), data.start
            if not self.adapts and not config.from_scratch:
                state = warm_start(config, data.tokenizer, state, self.tx, mesh)
            say(f"random weights of seed {config.seed}" if config.from_scratch else f"weights from {config.init}")
        if not self.keeps_base:
            return state, cursor, {}
        with working("reading the base"):
            step = cursor["base"]["step"] if restored else 0
            base = load_base(config, data.tokenizer, self.weight_shapes, step)
            if restored:
                check_base(config, base.params, cursor["base"])
            else:
                cursor = {**cursor, "base": {"step": base.step, "sha256": tree_sha256(base.params)}}
        self._base = base.params
        return state, cursor, {"base": base.params}

    def compile(self, step: Callable, frozen: Any, example: Any) -> Callable:
        """The step compiled for the state, `frozen` and a batch like `example`, once all processes have done so."""
        with working("compiling the training step"):
            shapes = self.shapes, frozen, example
            compiled = compile_step(step, self.mesh, *shapes).lower(*shapes).compile()
        barrier("compiled")
        return compiled

    def joined(self, params: Params, frozen: dict[str, Params]) -> Params:
        """The weights that a loss is given, inside of a program: with LoRA the base's with the leaves among them."""
        return join_lora(frozen["base"], params, self.config.lora.scale) if self.adapts else params

    def whole(self, params: Params, keep: bool = False) -> Params:
        """The weights to evaluate, decode and export: with LoRA the base's with the products added.

        With `keep` these are kept for the next call alone: training has no room for them.
        """
        if not self.adapts:
            return params
        kept, self._merged = self._merged, None
        same = kept is not None and kept[0] is params
        merged = kept[1] if kept is not None and same else self._merge(self._base, params, self.config.lora.scale)
        if keep:
            self._merged = params, merged
        return merged


class SampleAnswer:
    """The answer to the recipe's first prompt, as a message of a user, at each evaluation and at the end."""

    def __init__(self, tuning: Tuning, tokenizer: Tokenizer):
        config = tuning.config
        asked = [{"role": "user", "content": config.generate.prompt[0]}]
        before, _ = template_of(tokenizer).render(tokenizer, asked, add_generation_prompt=True)
        sampling = sample_settings(config, len(before)) if config.generate.prompt[0] else None

        def write(params: Params) -> str:
            if sampling is None:
                return ""
            pieces = stream_answers(tuning.decoder, tuning.whole(params), tokenizer, [asked], sampling)
            return "".join(piece for _, piece in pieces)

        self.wanted = sampling is not None
        self.write = once_a_step(write)
        """(state) -> text, "" where none is wanted."""
        self._sampling = sampling

    def print(self, state: TrainState) -> None:
        """Prints the last one, so that the first thing that one sees of a model is text."""
        with working("writing a sample"):
            text = self.write(state)
        print_sample(self._sampling, text, between="\n")
