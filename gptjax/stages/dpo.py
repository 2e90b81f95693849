"""Direct preference optimisation, from a run and preferences to a policy that prefers as they do: read `dpo`."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from gptjax.align.answers import PreferenceEvaluation, answer_log_probs
from gptjax.align.losses import preference_loss
from gptjax.config import DpoConfig
from gptjax.data.pairs import PreferenceData
from gptjax.evals.during import measure_tasks, named_tasks
from gptjax.model.decoder import Decoder
from gptjax.parallel.processes import say
from gptjax.parallel.sharding import abstract
from gptjax.runs.run import Provenance
from gptjax.runtime.status import entry
from gptjax.stages.runner import Runner, join
from gptjax.stages.tuning import SampleAnswer, Tuning, reading
from gptjax.training.step import LossFn, TrainState


def dpo(config: DpoConfig, provenance: Provenance) -> Path:
    """Trains the run in config.init on preferences into config.run_dir, or goes on with it there; returns its folder.

    The reference policy is config.init as it was: its weights stay on the mesh, where LoRA has them anyway, and its
    log-probabilities are computed in the step, by the same functions as the policy's. Raises InputError for bad input,
    and Interrupted after a signal or near the time limit, with everything saved.
    """
    with join(config, provenance) as group:
        mesh, config = group.mesh, group.config
        # -- Data, in memory: from it follow the steps, and from these the schedule.
        with reading(config, "reading preferences") as (run, resumes):
            data = PreferenceData(config, run.data, training=True, trees=False)
        config = dataclasses.replace(config, steps=data.steps)

        # -- Model, optimizer and step: functions and shapes alone.
        tasks = named_tasks(config.evaluate.tasks)

        def loss(decoder: Decoder) -> LossFn:
            log_probs = answer_log_probs(decoder)
            return preference_loss(
                lambda params, frozen, batch: log_probs(params, batch),
                lambda params, frozen, batch: log_probs(frozen["base"], batch),
                beta=config.beta,
                kind=config.kind,
            )

        tuning = Tuning(config, mesh, loss, reference=True)
        example = abstract(data.batch(0), mesh)
        rows = config.data.batch_size * data.train.num_answers
        of_answers = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))
        group.describe_step(of_answers, tuning.shapes, tuning.frozen_shapes)
        say(entry("data", data.describe()))

        # -- Run folder, and the state: a checkpoint comes before config.init.
        runner = Runner(group, config, provenance)
        runner.keep_tokenizer(data.tokenizer)
        state, cursor, frozen = tuning.begin(runner, data)
        runner.run.write_settings(config, provenance)

        # -- Train.
        train_step = tuning.compile(tuning.step, tuning.frozen_shapes, example)
        batches = group.cleanup.enter_context(contextlib.closing(data.batches(cursor, runner.rows.numbers)))
        sample = SampleAnswer(tuning, data.tokenizer)
        held = PreferenceEvaluation(config, tuning.decoder, mesh, tuning.weight_shapes, example, data.held)

        def evaluation(state: TrainState) -> dict[str, Any]:
            params, cfg = tuning.whole(state.eval_params, keep=sample.wanted), config.evaluate
            numbers = held(params, frozen["base"])
            return numbers | measure_tasks(tasks, tuning.decoder, params, data.tokenizer, mesh, cfg.limit, chat=True)

        # An answer is a row, which the reference reads, too.
        work = {"vocab_size": tuning.decoder.vocab_size, "rows": rows, "passes": tuning.passes + 1}
        state = runner.train(train_step, state, frozen, batches, evaluation, sample.write, **work)
        sample.print(state)
    return run.folder
