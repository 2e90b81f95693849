"""Laws of a served model: its text is that of the terminal and of generate, its scores those of the evaluation."""

import dataclasses
import json
import signal
import subprocess
import urllib.request
from pathlib import Path

import httpx
import jax
import pytest
from commands import GPTJAX, environment
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from serving import serving

from gptjax.cli import main
from gptjax.config import DataConfig, GenerateConfig, MeshConfig, ModelConfig, TokenizerConfig, TrainConfig
from gptjax.config.section import leaves
from gptjax.config.serving import ServeConfig
from gptjax.evals.score import Scorer
from gptjax.model.decoder import init_params, make_decoder
from gptjax.parallel.sharding import make_mesh
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.load import LoadedModel, load_model
from gptjax.runs.run import Run
from gptjax.serve.service import Service
from gptjax.serve.session import Session
from gptjax.tokenizer import BytesTokenizer, set_template

pytestmark = pytest.mark.usefixtures("compile_cache")
CONTEXT = 128


def save(run: Run, config: TrainConfig, step: int) -> None:
    """Adds a checkpoint, whose weights depend on its step."""
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
    params = jax.jit(init_params(make_decoder(config)))(jax.random.key(step))
    checkpoints.save(step, {"params": params}, {"rows": 0}, dict(leaves(config)))
    checkpoints.wait()


def make(folder: Path) -> tuple[Run, TrainConfig]:
    """A run of bytes with its first weights, whose template is llama2."""
    model = ModelConfig(num_layers=1, width=16, num_heads=2, dtype="float32")
    tokenizer = TokenizerConfig(kind="bytes", vocab_size=258, template="llama2")
    config = TrainConfig(run_dir=str(folder), model=model, tokenizer=tokenizer, data=DataConfig(length=CONTEXT))
    run, ours = Run.open(folder, config), BytesTokenizer()
    set_template(ours, "llama2")
    ours.save(run.tokenizer)
    save(run, config, 1)
    run.close()
    return run, config


def alone(model: LoadedModel) -> LoadedModel:
    """The model on one of the devices, for which programs compile faster."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return dataclasses.replace(model, mesh=mesh, params=jax.device_put(model.params, NamedSharding(mesh, P())))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Run, TrainConfig]:
    return make(tmp_path_factory.mktemp("served") / "run")


@pytest.fixture(scope="module")
def served(run, compile_cache):
    """A client of a server of the run, and the service."""
    service = Service(alone(load_model(run[0].folder, None)), ServeConfig(slots=4, max_waiting=32))
    service.scheduler.start()
    with serving(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client, service
    service.scheduler.stop()


def said(client, path, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_server_terminal_and_generate_give_the_same_text(served, run, capsys):
    client, _ = served
    model = alone(load_model(run[0].folder, None))
    for temperature, seed in ((0, 0), (0.7, 5)):
        ask = {"temperature": temperature, "seed": seed, "max_tokens": 20}
        answer = said(client, "/v1/chat/completions", messages=[{"role": "user", "content": "abc"}], **ask)
        settings = GenerateConfig(max_new_tokens=20, temperature=temperature, seed=seed)
        terminal = "".join(Session(model, model.tokenizer, settings).ask("abc"))
        assert answer["choices"][0]["message"]["content"] == terminal and terminal
        texts = [c["text"] for c in said(client, "/v1/completions", prompt=["abc", "x", "abc"], **ask)["choices"]]
        flags = ["--prompt", "abc", "x", "abc", "--max-new-tokens", "20", "--temperature", str(temperature)]
        assert main(["generate", str(run[0].folder), *flags, "--seed", str(seed)]) == 0
        assert capsys.readouterr().out == "".join(f"{p}{t}\n" for p, t in zip(("abc", "x", "abc"), texts))


def test_echo_scores_a_prompt_as_the_evaluation_does(served):
    client, service = served
    text = "to be, or not to be, 你好"
    ids = service.tokenizer.prompt_ids(text)
    ask = {"echo": True, "logprobs": 1, "temperature": 0}
    choices = [
        choice
        for prompt in ([ids], text)
        for choice in said(client, "/v1/completions", prompt=prompt, max_tokens=1, **ask)["choices"]
    ]
    scorer = Scorer(service.model.decoder, service.model.params, service.model.mesh)
    [wanted] = scorer.loglikelihoods([(ids[:1], ids[1:])])
    for choice in choices:
        scores = choice["logprobs"]
        assert len(scores["token_logprobs"]) == len(ids) + 1
        assert sum(scores["token_logprobs"][1:-1]) == pytest.approx(wanted.total, abs=1e-4)
        greedy = [own == max(top.values()) for own, top in
                  zip(scores["token_logprobs"][1:-1], scores["top_logprobs"][1:-1])]  # fmt: skip
        assert all(greedy) == wanted.greedy
    read = said(client, "/v1/completions", prompt=text, max_tokens=0, **ask)["choices"][0]
    assert read["logprobs"]["token_logprobs"] == choices[1]["logprobs"]["token_logprobs"][:-1]


def test_a_prefix_that_was_read_is_reused_and_changes_nothing(served):
    client, _ = served
    ask = {"prompt": "The same words once more, of which most have been read before. " * 2, "temperature": 0}
    one, two = (said(client, "/v1/completions", **ask, max_tokens=1) for _ in range(2))
    assert one["choices"] == two["choices"] and two["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_embeddings_depend_on_the_text_alone(served):
    client, _ = served
    a, b, again = (d["embedding"] for d in said(client, "/v1/embeddings", input=["abc", "xyz", "abc"])["data"])
    assert a == again != b and sum(x * x for x in a) == pytest.approx(1, abs=1e-5) and len(a) == 16


def test_json_of_a_schema_comes_from_any_model(served):
    client, _ = served
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"enum": ["a", "b"]}},
              "required": ["n", "s"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(3):
        answer = said(client, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], seed=seed, n=2,
                      max_tokens=40, response_format=form)  # fmt: skip
        for choice in answer["choices"]:
            found = json.loads(choice["message"]["content"])
            assert set(found) == {"n", "s"} and type(found["n"]) is int and found["s"] in "ab"


def test_a_newer_checkpoint_is_gone_on_with_when_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("gptjax.serve.service.load_model", lambda folder, mesh: alone(load_model(folder, None)))
    run, config = make(tmp_path / "run")
    service = Service(alone(load_model(run.folder, None)), ServeConfig(slots=2))
    service.scheduler.start()
    ask = {"prompt": "abc", "temperature": 0, "max_tokens": 20}
    with serving(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert client.post("/reload").json() == {"step": 1, "changed": False}
        first = said(client, "/v1/completions", **ask)
        save(run, config, 2)
        assert said(client, "/v1/completions", **ask)["choices"] == first["choices"]
        assert client.post("/reload").json() == {"step": 2, "changed": True}
        other = said(client, "/v1/completions", **ask)
        assert other["choices"] != first["choices"] and other["system_fingerprint"] == "step-2"
        assert client.get("/health").json()["step"] == 2
    service.scheduler.stop()


def test_the_command_says_where_it_listens_and_ends_well_at_sigterm(run, tmp_path):
    command = [*GPTJAX, "serve", str(run[0].folder), "--port", "0", "--slots", "2", "--name", "tiny"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(tmp_path / "cache"))
    assert process.stderr
    lines = []
    while not lines or not lines[-1].startswith("next: "):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    url = lines[-1].split("curl ")[1].partition("/v1/chat/completions")[0]
    assert url.startswith("http://127.0.0.1:") and any(f"as tiny on {url}" in line for line in lines)
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        assert json.load(answer)["data"][0]["id"] == "tiny"
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 0 and "GET /v1/models 200" in rest and rest.endswith("ended\n"), rest
