"""The Python API, for notebooks and scripts: train, load, generate, chat, evaluate, export. `import gptjax` has it all.

config = gptjax.recipe("quickstart", {"steps": 200, "model.width": 128})
model = gptjax.train(config)
print(gptjax.generate(model, "ROMEO."))
print(gptjax.evaluate(model)["eval_loss"])
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import jax

from gptjax.commands import evaluate_trained, measure_loaded
from gptjax.config import STAGES, EvalConfig, GenerateConfig, TrainConfig, TuneConfig
from gptjax.config.command_line import load_recipe, origins
from gptjax.config.export import ExportConfig
from gptjax.config.plugins import optional, register
from gptjax.config.section import InputError, build, leaves, unknown_name
from gptjax.data.manifest import with_corpus_tokenizer
from gptjax.evals.report import results_json
from gptjax.evals.tasks import load_task
from gptjax.generation.chat import stream_answers
from gptjax.generation.engine import generate as generate_texts
from gptjax.generation.image_prompts import open_picture
from gptjax.interop.export import export_model
from gptjax.runs.init_check import with_init
from gptjax.runs.load import LoadedModel, load_model
from gptjax.runs.run import Provenance, load_config
from gptjax.stages.early import check_early
from gptjax.stages.summary import print_summary
from gptjax.stages.verb import stage_function

C = TypeVar("C", bound=TrainConfig)
Image = str | Path | bytes
"""A picture: the path of a file, or its bytes."""


def recipe(
    name: str, settings: Mapping[str, Any] | None = None, *, stage: str = "pretrain", size: int | str | None = None
) -> TrainConfig:
    """The settings of a recipe's stage (a shipped name or a file), some of them replaced by their dotted names.

    The tokenizer is that of the prepared corpus, where data.source is one and the settings name no other; a stage that
    begins from the run in `init` has its model and tokenizer. Raises InputError for an unknown name or a value that is
    no good.
    """
    if stage not in STAGES:
        raise InputError(f"there is no stage {stage!r}; wanted one of {', '.join(STAGES)}")
    given = settings or {}
    config = override(load_recipe(name).config(stage, "" if size is None else str(size)), given)
    return with_init(config, given) if isinstance(config, TuneConfig) else with_corpus_tokenizer(config, given)


def override(config: C, settings: Mapping[str, Any]) -> C:
    """The config with {dotted name: value} replaced; raises InputError for an unknown name or a bad value."""
    values = dict(leaves(config))
    for setting in settings:
        if setting not in values:
            raise InputError(unknown_name(setting, list(values)))
    return build(type(config), values | dict(settings))


def train(
    config: TrainConfig,
    *,
    loss: Callable[..., Any] | None = None,
    block: Callable[..., Any] | None = None,
    source: Callable[..., Any] | None = None,
) -> LoadedModel:
    """Trains, or goes on with, the run in config.run_dir by the stage of its settings; returns its last step's model.

    A user's own parts take the place of ours:
    `loss(decoder)` returns loss_fn(params, frozen, batch, key) -> (loss, metrics), as `losses.language_model_loss`;
    `block(cfg, p, x_BLD, ...)` is one layer, as `model.block.block`, and may declare parameters of its own;
    `source()` yields texts, or mappings with the text under data.text_field.
    Raises InputError for bad input and training.stop.Interrupted after Ctrl-C, with everything saved.
    """
    parts = {"loss": loss, "model.block": block, "data.source": source}
    config = override(config, {setting: register(part) for setting, part in parts.items() if part is not None})
    if isinstance(config, TuneConfig):  # which may have been written out, without `recipe`
        config = with_init(config)
    provenance = Provenance(origins=origins(type(config)(), config, config))
    check_early(config)
    print_summary(config, provenance.origins)
    stage_function(config.stage)(config, provenance)
    return load(config.run_dir, block=optional(config.model.block, "model.block"))


def load(run_dir: str | Path, step: int = 0, *, block: Callable[..., Any] | None = None) -> LoadedModel:
    """The model of a run at a checkpoint (0: the newest), on all devices.

    A run that was trained with a block of the user's own needs that block again: what a run's folder names is never
    imported. Raises InputError where the folder is no run or has no sound checkpoint.
    """
    return load_model(run_dir, None, step, block=block, heads=load_config(run_dir).heads)


@overload
def generate(model: LoadedModel, prompt: str = "", *, images: Sequence[Image] = (), **settings: Any) -> str: ...


@overload
def generate(model: LoadedModel, prompt: list[str], *, images: Sequence[Image] = (), **settings: Any) -> list[str]: ...


def generate(
    model: LoadedModel, prompt: str | list[str] = "", *, images: Sequence[Image] = (), **settings: Any
) -> str | list[str]:
    """The continuation of a prompt, or of each of several, without the prompt itself.

    `images` (paths, or the bytes of files) stand before each prompt, for a model that reads them. `settings` are those
    of config.GenerateConfig: max_new_tokens, temperature, top_k, top_p, min_p, seed, stop, ...
    """
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    cfg = build(GenerateConfig, dict(leaves(GenerateConfig())) | {"prompt": prompts} | settings)
    pictures = [open_picture(image) for image in images]
    with jax.set_mesh(model.mesh):
        texts = generate_texts(model.decoder, model.params, model.tokenizer, cfg, pictures)
    return texts[0] if isinstance(prompt, str) else texts


def chat(
    model: LoadedModel, messages: str | Sequence[Mapping[str, Any]], *, images: Sequence[Image] = (), **settings: Any
) -> str:
    """The answer to a message of a user, or to a conversation of {"role", "content"}, by the run's chat template.

    `images` (paths, or the bytes of files) stand before the text of the last message; a content may also be a list of
    parts, {"type": "text", "text": ...} and {"type": "image", "image": a path or bytes}. `settings` are those of
    `generate`. Raises InputError where the run has no template or the conversation is too long, and for images that
    can't be read, or that the model does not read.
    """
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
    asked = [message | {"content": _content(message.get("content"))} for message in said]
    if images and asked:
        parts = asked[-1]["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        asked[-1]["content"] = [*({"type": "image", "image": open_picture(image)} for image in images), *parts]
    cfg = build(GenerateConfig, dict(leaves(GenerateConfig())) | settings)
    with jax.set_mesh(model.mesh):
        pieces = stream_answers(model.decoder, model.params, model.tokenizer, [asked], cfg)
        return "".join(piece for _, piece in pieces)


def _content(content: Any) -> Any:
    """A message's content with its images opened."""
    if not isinstance(content, list):
        return content
    parts = [dict(part) if isinstance(part, Mapping) else part for part in content]
    for part in parts:
        if isinstance(part, dict) and part.get("type") == "image" and "image" in part:
            part["image"] = open_picture(part["image"])
    return parts


def export(model: LoadedModel, folder: str | Path, **settings: Any) -> str:
    """Writes a new folder that transformers opens, or a GGUF file in it, with a model card; returns a line about it.

    `settings` are those of config.export.ExportConfig: format, dtype. Raises InputError where the folder holds
    something, or where no architecture can express the model, and leaves nothing then.
    """
    cfg = build(ExportConfig, dict(leaves(ExportConfig(step=model.step))) | settings)
    return export_model(model, folder, cfg)


def evaluate(
    model: LoadedModel, max_rows: int = 0, *, tasks: Sequence[str] = (), limit: int = 0, chat: bool = False
) -> dict[str, Any]:
    """step, eval_loss (nats a token), eval_perplexity, eval_bits_per_byte and eval_tokens on the run's validation sets.

    Only the first max_rows rows of each where that is not 0. With `tasks`, files as for `gptjax eval --tasks`, it gives
    what that writes to --json: {"tasks": [{"task", "metrics", ...}], "centred_accuracy"}, of `limit` items each (0:
    all), with `chat` each prompt as a message of a user. Raises InputError where a task's file is no good.
    """
    if not tasks:
        return evaluate_trained(model, max_rows)
    cfg = EvalConfig(tasks=tuple(tasks), limit=limit, chat=chat)
    return results_json(measure_loaded(model, [load_task(spec) for spec in cfg.tasks], cfg))
