"""report.html: a run on one page, drawn from its folder alone: curves, samples, settings, environment, events."""

import collections
import html
import json
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.model.counts import parameters
from gptjax.runs import chart
from gptjax.runs.chart import Series
from gptjax.runs.events import read_events
from gptjax.runs.run import Run, load_config, read_config
from gptjax.storage import filesystem, write_file
from gptjax.training.metrics_file import SPECIAL, MetricsFile

UNSETTLED = 5  # steps after a start, whose reports may come late and all at once, so that a step seems short
MOST_POINTS, MOST_SAMPLES, MOST_EVENTS, MOST_LETTERS = 1000, 30, 100, 4000

PREFERENCES = (
    ("accuracy", "Accuracy", "share of the pairs that the implicit reward orders right"),
    ("margin", "Margin", "implicit reward of the better answer less that of the worse"),
    ("ranking_accuracy", "Ranking accuracy", "share of the pairs whose better answer is the likelier"),
    ("log_p_chosen", "Log-probability of the better answer", "nats"),
    ("log_p_rejected", "Log-probability of the worse answer", "nats"),
    ("drift", "Drift", "|log pi / ref| of an answer, nats"),
)
"""Metrics of a stage that learns from preferences: name, title and unit."""
POLICY = (
    ("reward", "Reward", "mean of the answers"), ("kl", "KL to the reference", "nats an answer"),
    ("entropy", "Entropy", "nats a token"), ("length", "Length", "tokens an answer"),
    ("ended", "Answers that ended", "share"), ("clip_fraction", "Clipped", "share of the tokens"),
    ("explained_variance", "Explained variance", "of the returns, by the values"),
    ("log_p_gap_max", "Gap of log p", "nats, training and sampler, the largest of a step"),
)  # fmt: skip
"""Metrics of a policy that draws its own answers: name, title and unit."""

STYLE = """
:root { color-scheme: light dark; --text: #1c1c1e; --soft: #63636a; --line: #e2e2e6; --back: #fff; --card: #f6f6f8;
  --a: #1f5fa8; --b: #c2451e; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8ea; --soft: #a0a0a8; --line: #36363c; --back: #17171a;
  --card: #202024; --a: #6aa9f4; --b: #f58b62; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 78rem;
  margin: 0 auto; padding: 1.2rem 1rem 3rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p { margin: .2rem 0; } .soft, summary { color: var(--soft); } summary { cursor: pointer; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 1.4rem 1.6rem; }
.sample { background: var(--card); border-radius: 6px; padding: .5rem .8rem; margin: .5rem 0; }
pre { font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; }
table { border-collapse: collapse; font-size: .93rem; width: 100%; max-width: 58rem; }
th, td { padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--soft); } td { width: 100%; overflow-wrap: anywhere; }
th, td:first-child, td + td + td { width: auto; white-space: nowrap; } details + details { margin-top: .6rem; }
@media (max-width: 40rem) { td + td + td { white-space: normal; min-width: 6.5rem; } }
"""


def write_page(run: Run) -> None:
    """Writes report.html into a run's folder, whole or not at all; raises where a file can't be read or written."""
    write_file(run.report_path, html_page(run).encode())


def html_page(run: Run) -> str:
    """The page, which loads nothing and runs no script; below 2 MB however long the run is."""
    config, document = load_config(run.folder), read_config(run.folder)
    lines, stride = _thinned(run.metrics_path)
    events, samples = read_events(run.events_path), MetricsFile(run.samples_path).read()
    steps = [line for line in lines if "loss" in line]
    last: Mapping[str, Any] = steps[-1] if steps else {}
    state = (
        events[-1]["kind"] if events and events[-1]["kind"] in ("finished", "interrupted", "diverged") else "running"
    )
    model, count = config.model, parameters(config.model, config.tokenizer.vocab_size, config.data.length)["total"]
    title = run.folder.name
    drawn = "" if stride == 1 else f" One step of {stride:,} is drawn."
    body = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{state} at step {last.get('step', 0):,} of {config.steps:,}; {last.get('tokens', 0):,} tokens, "
        f"{_duration(last.get('seconds', 0.0))} of training</p>",
        f"<p class=soft>{count:,} parameters: {model.num_layers} layers x {model.width}, {model.num_heads} heads, "
        f"context {config.data.length:,}, {config.tokenizer.vocab_size:,} token ids; {config.data.batch_size:,} rows "
        f"a step; written {time.strftime('%Y-%m-%d %H:%M:%S %z')}.{drawn}</p>",
        f"<h2>Curves</h2><div class=charts>{''.join(_charts(steps, lines))}</div>",
        *_samples(samples),
        *_reliability(run),
        *_settings(document["settings"]),
        *_environment(json.loads(filesystem(run.folder).read(run.environment_path)), document["recipe"]),
        *_events(events),
    ]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'><link rel=icon href='data:,'>"
        f"<title>{_text(title)}</title><style>{STYLE}{chart.STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _thinned(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl: of steps every n-th up to the last, of evaluations as well, 2,000 at most; and n.

    Only those are parsed: a long run has a million lines, and is drawn again at each evaluation.
    """

    def whole() -> Iterator[tuple[bool, bytes]]:
        with path.open("rb") as file:
            yield from ((b'"eval_loss"' in raw, raw) for raw in file if raw.endswith(b"\n"))

    if not path.is_file():
        return [], 1
    left = collections.Counter(evaluates for evaluates, _ in whole())
    stride = {evaluates: -(-count // MOST_POINTS) for evaluates, count in left.items()}
    lines, since = [], 0
    for evaluates, raw in whole():
        left[evaluates] -= 1
        since = 0 if b'"tokens_per_second": null' in raw else since + (not evaluates)
        if left[evaluates] % stride[evaluates] == 0:
            line = {k: SPECIAL.get(v, v) if isinstance(v, str) else v for k, v in json.loads(raw).items()}
            lines.append(line | {"settled": since > UNSETTLED})
    return lines, stride.get(False, 1)


def _charts(steps: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> list[str]:
    def curve(name: str, key: str, show: Callable[[float], str], times: float = 1, of=steps, **how: bool) -> Series:
        points = [(line["step"], line[key] * times) for line in of if isinstance(line.get(key), int | float)]
        return Series(name, points, show, **how)

    nats = "{:.4f}".format
    named = [k for k in (lines[-1] if lines else {}) if k.startswith("eval_loss_")]
    tasks = {k: None for line in lines for k in line if k.startswith("task_") and not k.endswith("_stderr")}
    sources = {k: (k, f"Reward: {k.removeprefix('reward_')}", "mean of the answers") for line in steps for k in line
               if k.startswith("reward_") and k != "reward_std"}  # fmt: skip
    policy = [POLICY[0], *sources.values(), *POLICY[1:]]
    of_text = not any(name in line for line in steps[:1] for name in ("accuracy", "kl"))
    charts = [
        chart.chart("Loss", "nats a token" if of_text else "as the stage defines it", [
            curve("training", "loss", nats, noisy=True), curve("validation", "eval_loss", nats, of=lines, dots=True)]),
        chart.chart("Validation", "bits a byte of text", [
            curve("", "eval_bits_per_byte", nats, of=lines, dots=True)]),
        *(chart.chart(f"Loss on {key.removeprefix('eval_loss_')}", "nats a token", [
            curve("", key, nats, of=lines, dots=True)]) for key in named),
        *(chart.chart(key.removeprefix("task_"), "task", [curve("", key, nats, of=lines, dots=True)]) for key in tasks),
        *(chart.chart(title, unit, [
            curve("training", key, "{:.4g}".format, noisy=True),
            curve("held out", f"eval_{key}", "{:.4g}".format, of=lines, dots=True)])
          for key, title, unit in (*PREFERENCES, *policy)),
        chart.chart("Learning rate", "as scheduled", [curve("", "learning_rate", "{:.3g}".format)]),
        chart.chart("Gradient norm", "before clipping, logarithmic", [
            curve("", "grad_norm", "{:.3f}".format, noisy=True)], log=True),
        chart.chart("Speed", "tokens a second", [
            curve("", "tokens_per_second", "{:,.0f}".format, of=[line for line in steps if line["settled"]])]),
        chart.chart("Wait for input", "milliseconds a step, logarithmic", [
            curve("", "input_seconds", "{:.2g} ms".format, 1000, noisy=True)], log=True),
    ]  # fmt: skip
    return charts


def _samples(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    if any("reward" in s for s in samples):
        return _answers(samples)
    every = -(-len(samples) // MOST_SAMPLES) or 1
    shown = samples[::-1][::every]
    parts = [
        f"<details class=sample{' open' if i < 3 else ''}><summary>step {s['step']:,}</summary>"
        f"<pre><b>{_text(s['prompt'])}</b>{_text(s['text'])}</pre></details>"
        for i, s in enumerate(shown)
    ]
    return ["<h2>Samples</h2>", *parts] if parts else []


def _answers(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tables of answers with their rewards, one for each evaluation: of the last ones."""
    steps = sorted({s["step"] for s in samples}, reverse=True)[:MOST_SAMPLES]
    parts = ["<h2>Answers to held-out prompts</h2>"]
    for i, step in enumerate(steps):
        rows = [(s["prompt"], s["text"], f"{s['reward']:.4g}") for s in samples if s["step"] == step]
        shown = _table(("prompt", "answer", "reward"), rows)
        parts.append(
            f"<details class=sample{' open' if i == 0 else ''}><summary>step {step:,}</summary>{shown}</details>"
        )
    return parts


def _reliability(run: Run) -> list[str]:
    """The table of a reward model's confidence and accuracy on held-out pairs, once it is known."""
    files = filesystem(run.folder)
    if not files.is_file(run.scores_path):
        return []
    known = json.loads(files.read(run.scores_path))
    rows = [
        (f"{low:.2f} and more", f"{n:,.0f}", f"{sure:.3f}", f"{right:.3f}")
        for low, n, sure, right in known["reliability"]
    ]
    return [
        "<h2>Reliability on held-out pairs</h2>",
        f"<p>Of pairs that are decided with a confidence, the share that is decided right; they are apart by "
        f"{known['eval_calibration_error']:.3f} on average, the expected calibration error.</p>",
        _table(("confidence", "pairs", "mean confidence", "accuracy"), rows),
    ]


def _settings(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    parts = ["<h2>Settings</h2>"]
    kinds = {"command line": "from the command line", "recipe": "from the recipe", "default": "defaults"}
    for origin, words in kinds.items():
        rows = [(n, json.dumps(s["value"], ensure_ascii=False)) for n, s in settings.items() if s["from"] == origin]
        shown = " open" if origin != "default" else ""
        if rows:
            parts.append(f"<details{shown}><summary>{len(rows)} {words}</summary>{_table((), rows)}</details>")
    return parts


def _environment(environment: Mapping[str, Any], recipe: Mapping[str, str]) -> list[str]:
    flat = {k: shlex.join(v) if k == "command" else v for k, v in environment.items()}
    rows = [("recipe", f"{recipe['path']} (sha256 {recipe['sha256']})")] if recipe["path"] else []
    for name, value in flat.items():
        words = ", ".join(f"{k} {v}" for k, v in value.items() if v) if isinstance(value, Mapping) else value
        words = _moment(words) if name == "time" else words
        rows += [(name, words)] if words else []
    return ["<h2>Environment</h2>", _table((), rows)]


def _events(events: Sequence[Mapping[str, Any]]) -> list[str]:
    known = ("time", "step", "kind")
    rows = []
    for event in events[::-1][:MOST_EVENTS]:
        more = [f"{k} {v}" for k, v in event.items() if k not in (*known, "changes") and v not in ("", [])]
        words = "; ".join([*event.get("changes", []), *more])
        rows.append((f"{event['step']:,}", event["kind"] + (f": {words}" if words else ""), _moment(event["time"])))
    left = len(events) - len(rows)
    note = [f"<p class=soft>{left:,} earlier ones are in events.jsonl.</p>"] if left else []
    return ["<h2>Events</h2>", _table(("after step", "event", "time"), rows), *note] if rows else []


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "<tr>" + "".join(f"<th>{_text(name)}</th>" for name in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{top}{body}</table>"


def _text(words: Any) -> str:
    words = str(words)
    return html.escape(words if len(words) <= MOST_LETTERS else f"{words[:MOST_LETTERS]} ... (cut)")


def _moment(iso: str) -> str:
    return iso[:19].replace("T", " ")


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    return f"{hours}h{minutes % 60:02d}m" if hours else f"{minutes}m{round(seconds) % 60:02d}s"
