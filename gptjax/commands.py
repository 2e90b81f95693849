"""Verbs on a run: evaluate it, continue prompts, show its data.

Each imports its own room: continuing a prompt needs none of data or evals.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from gptjax.config import ContinueConfig, DpoConfig, EvalConfig, InspectConfig, MeshConfig, PolicyConfig
from gptjax.config.section import InputError, leaves, one_line
from gptjax.parallel.processes import is_main_process, join_processes
from gptjax.parallel.sharding import abstract
from gptjax.runs.load import LoadedModel, check_base, load_model, open_checkpoints
from gptjax.runs.run import Run, load_config
from gptjax.storage import check_file, write_json

if TYPE_CHECKING:
    from gptjax.config.serving import ServeConfig
    from gptjax.data.images import Picture
    from gptjax.data.pairs import PreferenceData
    from gptjax.evals.measure import TaskResult
    from gptjax.evals.tasks import Task
    from gptjax.generation.constraint import Constraint


def show_evaluation(run_dir: str | Path, cfg: EvalConfig, write: Callable[[str], None], note: Callable[[str], None]):
    """Writes, line by line, a run's numbers on cfg.tasks, against another run, or on its validation split."""
    if cfg.tasks:
        from gptjax.evals.report import table

        for line in table(evaluate_tasks(run_dir, cfg, note)):
            write(line)
        return
    if cfg.against:
        from gptjax.evals.win_rate import win_rate

        join_processes({"run": str(run_dir), **dict(leaves(cfg))})
        numbers = win_rate(run_dir, cfg, note)
    else:
        numbers = evaluate_run(run_dir, cfg)
    for name, value in numbers.items():
        write(f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}")


def evaluate_run(run_dir: str | Path, cfg: EvalConfig) -> dict[str, Any]:
    """Evaluates a run on its validation split: step, eval_loss, eval_perplexity, eval_bits_per_byte, eval_tokens."""
    join_processes({"run": str(run_dir), **dict(leaves(cfg))})
    model = load_model(run_dir, cfg.mesh, cfg.step, heads=[h for h in load_config(run_dir).heads if h == "score_D"])
    return evaluate_trained(model, cfg.max_rows)


def evaluate_tasks(run_dir: str | Path, cfg: EvalConfig, note: Callable[[str], None]) -> "list[TaskResult]":
    """Evaluates a run on cfg.tasks, which are all read first; `note` is told of each that begins.

    Raises InputError where a task's file is no good. Writes cfg.json and cfg.items, where they are set.
    """
    from gptjax.evals.report import results_json, write_records
    from gptjax.evals.tasks import load_task

    join_processes({"run": str(run_dir), **dict(leaves(cfg))})
    tasks = [load_task(spec) for spec in cfg.tasks]
    for path in filter(None, (cfg.json, cfg.items)):
        check_file(path)
    model = load_model(run_dir, cfg.mesh, cfg.step)
    results = measure_loaded(model, tasks, cfg, note)
    if is_main_process():
        if cfg.json:
            settings = {"run": str(run_dir), "step": model.step, "limit": cfg.limit, "seed": cfg.seed, "chat": cfg.chat}
            write_json(cfg.json, settings | results_json(results))
        if cfg.items:
            write_records(cfg.items, results)
    return results


def measure_loaded(
    model: LoadedModel, tasks: "Sequence[Task]", cfg: EvalConfig, note: Callable[[str], None] = lambda line: None
) -> "list[TaskResult]":
    """Results of a loaded model on tasks; of cfg its limit, seed, chat, template and batch_tokens are read."""
    from gptjax.evals.measure import measure
    from gptjax.evals.score import Scorer
    from gptjax.tokenizer import set_template

    tokenizer, results = model.tokenizer, []
    set_template(tokenizer, cfg.template)
    scorer = Scorer(model.decoder, model.params, model.mesh, batch_tokens=cfg.batch_tokens)
    for task in tasks:
        used = min(cfg.limit or len(task.items), len(task.items))
        note(f"{task.name}: {used:,} of {len(task.items):,} items, shots={task.config.shots}")
        results.append(measure(task, scorer, tokenizer, limit=cfg.limit, seed=cfg.seed, chat=cfg.chat))
    return results


def evaluate_trained(model: LoadedModel, max_rows: int = 0) -> dict[str, Any]:
    """Evaluates a loaded model on its validation sets: the numbers of `evaluate_run`."""
    if isinstance(model.config, PolicyConfig):
        raise InputError(
            f"{model.run.folder} is a run by gptjax {model.config.stage}, which holds out prompts, no text; "
            "wanted --tasks"
        )
    from gptjax.data.chats import ChatData
    from gptjax.data.packing import example_batch
    from gptjax.data.pairs import PreferenceData
    from gptjax.data.pipeline import open_pipeline
    from gptjax.evals.loss import evaluate, make_eval_step

    # How much of a set in memory is tokenised depends on it.
    limits = dataclasses.replace(model.config.evaluate, max_rows=max_rows)
    model.run.pull(model.run.data)
    data = open_pipeline(dataclasses.replace(model.config, evaluate=limits), model.run.data)
    data.check(model.data_state)
    if "score_D" in model.params:
        from gptjax.evals.preferences import evaluate_reward

        return {"step": model.step, **evaluate_reward(model, data.held, max_rows)}  # pyright: ignore
    if isinstance(data, PreferenceData):
        return {"step": model.step, **_evaluate_preferences(model, data, max_rows)}
    with jax.set_mesh(model.mesh):
        size, length = model.config.data.batch_size, model.config.data.length
        example = abstract(data.example if isinstance(data, ChatData) else example_batch(size, length), model.mesh)
        eval_step = make_eval_step(model.decoder, model.mesh, model.params, example, isinstance(data, ChatData))
        metrics = evaluate(eval_step, model.params, data.validation, max_rows, model.mesh)
    return {"step": model.step, **metrics}


def _evaluate_preferences(model: LoadedModel, data: "PreferenceData", max_rows: int) -> dict[str, Any]:
    """The numbers of a policy on the preferences that are held out, beside its reference's."""
    from gptjax.align.answers import PreferenceEvaluation

    config = model.config
    assert isinstance(config, DpoConfig)
    mark = model.data_state["base"]
    reference = load_model(config.init, MeshConfig(**model.mesh.shape), mark["step"]).params
    check_base(config, reference, mark)
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, max_rows=max_rows))
    with jax.set_mesh(model.mesh):
        example = abstract(data.batch(0), model.mesh)
        held = PreferenceEvaluation(config, model.decoder, model.mesh, model.params, example, data.held)
        return held(model.params, reference)


def generate_run(run_dir: str | Path, cfg: ContinueConfig, write: Callable[[str], None]) -> None:
    """Continues cfg.prompt with a run, or answers it, writing text as it comes; several prompts one after the other."""
    from gptjax.generation.engine import stream

    join_processes({"run": str(run_dir), **dict(leaves(cfg))})
    answers_alone = cfg.chat or bool(cfg.shots)
    if cfg.shots:
        from gptjax.generation.shots import read_shots

        shots = read_shots(cfg.shots)
        prompts = tuple(shots.prompt(text) for text in cfg.prompt)
        cfg = dataclasses.replace(cfg, prompt=prompts, stop=(*cfg.stop, shots.stop))
    images = _pictures(cfg.image) if cfg.image else []
    model = load_model(run_dir, None, cfg.step)
    with jax.set_mesh(model.mesh):
        constraint = _constraint(model, cfg) if cfg.choices or cfg.json_schema else None
        if cfg.chat:
            pieces = _answers(model, cfg, images, constraint)
        else:
            pieces = stream(model.decoder, model.params, model.tokenizer, cfg, constraint=constraint, images=images)
        first = list(itertools.islice(pieces, 1))  # a prompt that does not fit is refused before anything is written
        texts = [""] * len(cfg.prompt) if answers_alone else list(cfg.prompt)
        if len(texts) == 1:
            write(texts[0])
            begun = not cfg.shots  # an answer's first space stands behind the colon
            for _, piece in itertools.chain(first, pieces):
                piece = piece if begun else piece.lstrip()
                begun = begun or bool(piece)
                write(piece)
            write("\n")
            return
        for row, piece in itertools.chain(first, pieces):
            texts[row] += piece
        for text in texts:
            write(f"{text.lstrip() if cfg.shots else text}\n")


def _constraint(model: LoadedModel, cfg: ContinueConfig) -> "Constraint":
    """The constraint that cfg.choices or cfg.json_schema says."""
    from gptjax.generation.constraint import choices_constraint, json_constraint
    from gptjax.generation.engine import drawable
    from gptjax.tokenizer import set_template
    from gptjax.tokenizer.known_templates import template_of

    tokenizer = model.tokenizer
    more: Any = {"size": drawable(model.decoder, tokenizer), "spaced": True}
    ends = tokenizer.end_ids
    if cfg.chat:
        set_template(tokenizer, cfg.template)
        template = template_of(tokenizer)
        ends, more["spaced"] = template.stop_ids(tokenizer), template.spaced(tokenizer)
    if cfg.choices:
        return choices_constraint(tokenizer, cfg.choices, ends, **more)
    try:
        schema = json.loads(Path(cfg.json_schema).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"json_schema={cfg.json_schema!r} can't be read as JSON ({one_line(e)})") from e
    return json_constraint(tokenizer, schema, ends, **more)


def _pictures(paths: Sequence[str]) -> "list[Picture]":
    from gptjax.generation.image_prompts import open_picture

    return [open_picture(path) for path in paths]


def _answers(
    model: LoadedModel, cfg: ContinueConfig, images: "Sequence[Picture]", constraint: "Constraint | None"
) -> Iterator[tuple[int, str]]:
    from gptjax.generation.chat import stream_answers
    from gptjax.generation.image_prompts import with_pictures
    from gptjax.tokenizer import set_template

    tokenizer = model.tokenizer
    set_template(tokenizer, cfg.template)
    system = [{"role": "system", "content": cfg.system}] if cfg.system else []
    chats = [[*system, {"role": "user", "content": with_pictures(prompt, images)}] for prompt in cfg.prompt]
    return stream_answers(model.decoder, model.params, tokenizer, chats, cfg, constraint=constraint)


def inspect_run(
    run_dir: str | Path, text: str, cfg: InspectConfig, write: Callable[[str], None], note: Callable[[str], None]
) -> None:
    """Writes a table of what a run makes of a text, and the page and the JSON that cfg names."""
    from gptjax.serve.inspection import inspect, inspection_json, inspection_page, inspection_prompt, inspection_table

    for path in filter(None, (cfg.out, cfg.json)):
        check_file(path)
    pictures = _pictures(cfg.image)
    model = load_model(run_dir, None, cfg.step)
    found = inspect(model, inspection_prompt(model, text, pictures, cfg.chat) if pictures or cfg.chat else text)
    for line in inspection_table(found):
        write(line)
    if cfg.json:
        write_json(cfg.json, inspection_json(found))
    if cfg.out:
        Path(cfg.out).write_text(inspection_page(found), encoding="utf-8")
        note(f"wrote {cfg.out}, {Path(cfg.out).stat().st_size / 1e6:.1f} MB: open it in a browser")


def serve_run(run_dir: str, cfg: "ServeConfig", note: Callable[[str], None]) -> int:
    """Serves a run until it is told to end; returns the exit code. Raises InputError where the extra is missing."""
    try:
        from gptjax.serve.server import serve
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] not in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
            raise
        missing = f"gptjax serve needs packages more ({e.name} is missing): pip install 'gptjax[serve]'"
        raise InputError(missing) from None
    return serve(run_dir, cfg, note)


def list_checkpoints(run_dir: str | Path, write: Callable[[str], None], note: Callable[[str], None]) -> bool:
    """Writes the checkpoints of a run with their sizes, or notes that there is none; True where there are some."""
    checkpoints = open_checkpoints(run_dir).describe()
    for saved in checkpoints:
        write(f"step {saved.step}  {saved.bytes / 1e6:,.1f} MB in {saved.files} files")
    if not checkpoints:
        note(f"{run_dir} has no checkpoint yet")
    return bool(checkpoints)


def verify_checkpoints(run_dir: str | Path, write: Callable[[str], None]) -> None:
    """Writes for each checkpoint of a run if its files and numbers are sound; raises InputError where one is not."""
    checkpoints, bad = open_checkpoints(run_dir), 0
    if not (steps := checkpoints.steps()):
        raise InputError(f"{run_dir} has no checkpoint yet, so there is nothing to verify")
    for step in steps:
        problems = checkpoints.verify(step)
        bad += bool(problems)
        write(f"step {step}: " + ("; ".join(problems) or "sound"))
    if bad:
        raise InputError(f"{run_dir}: {bad} checkpoint(s) are not sound; a resume falls back to the newest sound one")


def show_step(run_dir: str | Path, step: int, rows: int) -> str:
    """The rows of a training step of a run, as text; step 1 is the first.

    Raises InputError where the data is not what the run's newest checkpoint was trained on.
    """
    from gptjax.data.pipeline import open_pipeline
    from gptjax.data.show import show
    from gptjax.runs.events import rows_of_step

    config, run = load_config(run_dir), Run.existing(run_dir)
    run.pull(run.data, run.events_path)
    first, batch_size = rows_of_step(run.events_path, step, config.data.batch_size)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch_size))
    data = open_pipeline(config, run.data)
    checkpoints = open_checkpoints(run_dir)
    if (newest := checkpoints.newest()) is not None:
        data.check(checkpoints.data_state(newest))
    return show(data.batch(first), data.tokenizer, range(min(rows, batch_size)), data.sources(first))
