"""The model card of an export: a README.md with the hub's front matter, made from a run's settings and metrics."""

import json
from typing import Any

from gptjax.config import ModelConfig, TrainConfig, VisionConfig
from gptjax.config.export import ExportConfig
from gptjax.config.tuning import SCRATCH
from gptjax.interop.image_architectures import image_id
from gptjax.model.counts import parameters
from gptjax.runs.run import Run
from gptjax.runtime.versions import __version__
from gptjax.training.metrics_file import MetricsFile

OF_OTHERS = ("hf:", "tfds:", "builtin:")  # sources whose names mean something elsewhere


def model_card(run: Run, config: TrainConfig, step: int, architecture: str, cfg: ExportConfig) -> str:
    """The text of README.md for a run's model at a step, in transformers' (or llama.cpp's) architecture.

    It names no folder of this machine, and leaves the licence to the user.
    """
    run.pull(run.metrics_path)
    lines = [line for line in MetricsFile(run.metrics_path).read() if line["step"] <= step]
    gguf = cfg.format == "gguf"
    front = [
        "---",
        "# license: apache-2.0  # choose one, and take this line's first two characters away",
        *([] if gguf else ["library_name: transformers"]),
        f"pipeline_tag: {'image-text-to-text' if config.model.vision.patch else 'text-generation'}",
        f"tags: [gptjax, jax, {'gguf' if gguf else 'safetensors'}]",
        "---",
    ]
    sections = [
        f"# {run.folder.name}",
        f"{_origin(config, step, lines)} Its weights are those of step {step:,} in {cfg.weights_dtype}, as "
        f"{architecture}.",
        "## Model",
        _table(_model(config.model, config.tokenizer.vocab_size, config.data.length) | _tokenizer(config)),
        *(["## Training", _table(_training(run, config, step, lines))] if lines else []),
        *(["## Results", _table(results)] if (results := _results(lines)) else []),
        "## Use",
        _use(config, gguf),
        "## License",
        "Not stated yet: whoever publishes this model names its licence here and in the first lines of this file, "
        "after a look at those of the data" + (" and of the weights that it began from." if not lines else "."),
    ]
    return "\n".join(front) + "\n\n" + "\n\n".join(sections) + "\n"


def source_name(source: str) -> str:
    """The name of a source of text without the folders that lead to it on this machine."""
    kind = next((kind for kind in OF_OTHERS if source.startswith(kind)), "")
    place = source.removeprefix(kind)
    return source if kind and not place.startswith(("/", ".", "~")) else kind + place.rstrip("/").rpartition("/")[2]


def _origin(config: TrainConfig, step: int, lines: list[dict[str, Any]]) -> str:
    if not lines:
        return f"A language model that was imported into gptjax from {source_name(config.data.source)}."
    names = ", ".join(source_name(source) for source in config.data.sources.values())
    begun = f", beginning with the weights of {source_name(config.init)}" if config.init not in ("", SCRATCH) else ""
    return f"A language model trained on {names} with gptjax{begun}."


def _model(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    count = parameters(cfg, vocab_size, context)
    shared = f", {cfg.num_kv_heads} of keys and values" if cfg.queries_per_kv > 1 else ""
    return {
        "parameters": f"{count['total']:,}, of which {count['embedding']:,} in the embedding",
        "layers": cfg.num_layers,
        "width": f"{cfg.width:,}, MLP {cfg.mlp_width:,} ({cfg.activation})",
        "heads": f"{cfg.num_heads} of size {cfg.head_size}{shared}",
        "positions, norm": f"{cfg.positions}, {cfg.norm}",
        "context": f"{context:,} tokens",
        "vocabulary": f"{vocab_size:,} tokens" + (", the head is the embedding" if cfg.tied else ""),
        **({"images": _images(cfg.vision)} if cfg.vision.patch else {}),
    }


def _images(v: VisionConfig) -> str:
    return (
        f"{v.side} x {v.side} pixels ({v.fit}), {v.num_tokens:,} tokens each; an encoder of {v.layers} layers, width "
        f"{v.width:,}, reads patches of {v.patch} x {v.patch}"
    )


def _tokenizer(config: TrainConfig) -> dict[str, Any]:
    return {"tokenizer": config.tokenizer.kind}


def _training(run: Run, config: TrainConfig, step: int, lines: list[dict[str, Any]]) -> dict[str, Any]:
    data, optim = config.data, config.optim
    tokens = next((line["tokens"] for line in reversed(lines) if "tokens" in line), None)
    versions = json.loads(run.environment_path.read_text(encoding="utf-8"))["versions"]
    more = {"averaged weights": f"decay {optim.ema:g}; this export is of those"} if optim.ema else {}
    more |= {"muP": f"base width {config.model.mup_base_width}"} if config.model.mup_base_width else {}
    final = f", to {optim.final_fraction:g} of the peak" if optim.schedule in ("cosine", "linear", "wsd") else ""
    return {
        "data": ", ".join(source_name(source) for source in data.sources.values()),
        "steps": f"{step:,} of {config.steps:,}",
        **({} if tokens is None else {"tokens": f"{tokens:,}"}),
        "batch": f"{data.batch_size:,} rows of {data.length:,} tokens",
        "optimizer": f"{optim.kind}, learning rate {optim.learning_rate:g}, weight decay {optim.weight_decay:g}",
        "schedule": f"{optim.schedule}, {optim.warmup_steps:,} steps of warm-up{final}",
        **more,
        "precision": f"{config.model.dtype} activations, float32 weights",
        "software": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }


def _results(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The last training loss and what the last evaluation says, of each validation set."""
    trained = next((line for line in reversed(lines) if "loss" in line), {})
    evaluated = next((line for line in reversed(lines) if "eval_loss" in line), {})
    shown = {"training loss (nats a token)": trained["loss"]} if trained else {}
    named = [n for n in evaluated if n.startswith(("eval_loss", "eval_bits_per_byte", "eval_perplexity"))]
    shown |= {f"{n}, step {evaluated['step']:,}": evaluated[n] for n in named}
    return {name: f"{value:.4f}" for name, value in shown.items() if isinstance(value, float)}


def _use(config: TrainConfig, gguf: bool) -> str:
    prompt = json.dumps(config.generate.prompt[0] or "The")
    if gguf:
        return f"```bash\nllama-cli -m model.gguf -p {prompt}\ngptjax import model.gguf runs/imported\n```"
    if config.model.vision.patch:
        v, place = config.model.vision, image_id(config.model, config.tokenizer.vocab_size)
        return f"""```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

tokenizer, processor = AutoTokenizer.from_pretrained("."), AutoImageProcessor.from_pretrained(".")
model = AutoModelForImageTextToText.from_pretrained(".")
pixels = processor([Image.open("picture.png").convert("RGB")], return_tensors="pt")["pixel_values"]
image = [*{list(v.begin)}, *[{place}] * {v.num_tokens}, *{list(v.end)}]
ids = torch.tensor([[*image, *tokenizer({prompt}, add_special_tokens=False)["input_ids"]]])
print(tokenizer.decode(model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=50)[0]))
```

With gptjax {__version__}: `gptjax import FOLDER runs/imported`."""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer({prompt}, return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

With gptjax {__version__}: `gptjax import FOLDER runs/imported`."""


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value} |".replace("\n", " ") for name, value in rows.items())]
    )
