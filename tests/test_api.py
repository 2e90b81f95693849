"""The Python API: what a notebook does, with parts of the user's own."""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config.plugins import register, resolve
from gptjax.config.section import InputError
from gptjax.model.block import block as own_block
from gptjax.model.block import layer_params as own_params
from gptjax.model.decoder import head, init_params, make_decoder
from gptjax.runs.init_check import _check_settings
from gptjax.runs.run import Run
from gptjax.runs.warm_start import _check_shapes
from gptjax.training.build import build_components
from gptjax.training.losses import token_log_probs
from gptjax.training.metrics_file import MetricsFile

TINY = {
    "steps": 6, "model.num_layers": 2, "model.width": 16, "model.num_heads": 2, "tokenizer.kind": "bytes",
    "tokenizer.vocab_size": 258, "data.length": 32, "data.batch_size": 8, "evaluate.max_rows": 8,
    "sample": False, "sinks": (),
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i}: the quick brown fox jumps over the lazy dog\n" for i in range(400)))
    return path


def config(folder: Path, text: Path, **settings):
    more = {name.replace("__", "."): value for name, value in settings.items()}
    return gptjax.recipe("quickstart", TINY | {"run_dir": str(folder), "data.source": str(text)} | more)


def metrics(model, key: str) -> list:
    """The values of a key in the lines of a model's metrics.jsonl that have it."""
    lines = MetricsFile(model.run.metrics_path).read()
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, text, compile_cache):
    return gptjax.train(config(tmp_path_factory.mktemp("runs") / "plain", text, log_norms_every=2))


def test_a_notebook_trains_loads_generates_and_evaluates(plain, capsys):
    loaded = gptjax.load(plain.run.folder)
    assert loaded.step == 6
    one, other = (gptjax.generate(model, "the ", max_new_tokens=5, seed=3) for model in (loaded, plain))
    assert one == other
    assert len(gptjax.generate(plain, ["a", "b"], max_new_tokens=2)) == 2
    known = metrics(plain, "eval_loss")[0]
    assert gptjax.evaluate(plain, max_rows=8)["eval_loss"] == pytest.approx(known, rel=1e-6)


def test_bad_settings_are_one_line(plain):
    with pytest.raises(InputError, match="there is no setting model.widht; did you mean model.width"):
        gptjax.recipe("quickstart", {"model.widht": 3})
    with pytest.raises(InputError, match="there is no setting temprature; did you mean temperature"):
        gptjax.generate(plain, "a", temprature=1.0)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        gptjax.trian  # noqa: B018


def test_norms_by_layer_are_those_of_the_gradients_and_come_every_n_steps(plain):
    steps = [line for line in MetricsFile(plain.run.metrics_path).read() if "loss" in line]
    assert [line["step"] for line in steps if "grad_norm_by_layer" in line] == [1, 2, 4, 6]
    for line in steps:
        assert line["peak_memory_bytes"] > 0
        if "grad_norm_by_layer" in line:
            layers = np.array(line["grad_norm_by_layer"])
            assert len(layers) == len(line["activation_rms_by_layer"]) == 2
            # The layers' part of the whole gradient, which also has the embedding and the last norm.
            assert 0 < np.sqrt((layers**2).sum()) < line["grad_norm"]


def test_a_loss_of_the_users_own_is_trained(tmp_path, text):
    def focal(decoder):
        """Focal loss (Lin et al. 2017): tokens that are known already count less."""

        def loss_fn(params, frozen, batch, key):
            inputs = (batch["inputs_BL"], batch["positions_BL"], batch["segments_BL"])
            x_BLD, _ = decoder.apply({"params": params}, *inputs, key=key)
            log_p_BL, _ = token_log_probs(x_BLD, head(params), batch["targets_BL"], decoder.vocab_size)
            weight = batch["weights_BL"].sum()
            loss = (batch["weights_BL"] * (1 - jnp.exp(log_p_BL)) ** 2 * -log_p_BL).sum() / weight
            return loss, {"loss": loss, "weight": weight}

        return loss_fn

    model = gptjax.train(config(tmp_path / "focal", text), loss=focal)
    first = metrics(model, "loss")[0]
    assert 0.98 * np.log(258) < first < np.log(258), "a little below the plain loss of a new model"
    assert model.config.loss.endswith(".focal")


@pytest.mark.parametrize(
    ("made", "said"),
    [((0.0, {"nats": 0.0}), r"metrics \['nats'\]"), ((0.0, {"loss": 0.0}), r"metrics \['loss'\]"), (0.0, "a float")],
)
def test_a_loss_without_the_numbers_that_training_reads_is_one_line(tmp_path, text, made, said):
    def lacking(decoder):
        return lambda params, frozen, batch, key: made

    cfg = config(tmp_path / "lacking", text)
    parts = build_components(gptjax.override(cfg, {"loss": register(lacking)}))
    with pytest.raises(InputError, match=f"lacking' returned {said}; wanted .* 'loss', .*'weight'") as e:
        jax.eval_shape(parts.step, jax.eval_shape(parts.init, 0), {}, {})
    assert "\n" not in str(e.value)


class Scaled:
    """A block whose branches are scaled by a number learned for each layer (ReZero; Bachlechner et al. 2020)."""

    @staticmethod
    def layer_params(cfg):
        return own_params(cfg) | {"gate_ND": "zeros"}

    def __call__(self, cfg, p, x_BLD, *rest):
        y_BLD, cache = own_block(cfg, p, x_BLD, *rest)
        return x_BLD + p["gate_D"].astype(x_BLD.dtype) * (y_BLD - x_BLD), cache


@pytest.mark.parametrize("name", ["gate_NZ", "gate_DN", "gate"])
def test_a_parameter_of_a_block_with_letters_that_nobody_knows_is_one_line(tmp_path, text, name):
    class Lettered(Scaled):
        @staticmethod
        def layer_params(cfg):
            return own_params(cfg) | {name: "zeros"}

    decoder = make_decoder(config(tmp_path, text), Lettered)
    with pytest.raises(InputError, match=f"parameter '{name}' ends in .*wanted N .* of V=320, T=32, N=2, D=16") as e:
        jax.eval_shape(init_params(decoder), jax.random.key(0))
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_a_block_of_the_users_own_is_trained_and_needed_again_to_load(tmp_path, text):
    model = gptjax.train(config(tmp_path / "scaled", text), block=Scaled())
    gate_ND = np.asarray(model.params["layers"]["gate_ND"])
    assert gate_ND.shape == (2, 16) and np.abs(gate_ND).max() > 0, "its parameter was trained"
    with pytest.raises(InputError, match=r"was trained with the block .*gptjax.load"):
        gptjax.load(model.run.folder)
    again = gptjax.load(model.run.folder, block=Scaled)  # the class does as well
    assert gptjax.generate(again, "the", max_new_tokens=4) == gptjax.generate(model, "the", max_new_tokens=4)


@pytest.mark.slow
def test_a_source_of_the_users_own_is_read(tmp_path):
    def numbers():
        for i in range(300):
            yield f"{i} squared is {i * i}, and its cube {i**3}."

    model = gptjax.train(config(tmp_path / "numbers", Path("unused"), steps=2), source=numbers)
    assert len(metrics(model, "loss")) == 2


def test_what_leads_nowhere_or_would_be_ignored_or_confused_is_refused(tmp_path, text):
    (tmp_path / "empty.txt").touch()

    def refused(message: str, loss=None, **settings) -> None:
        with pytest.raises(InputError, match=message):
            gptjax.train(config(tmp_path / "run", text, **settings), loss=loss)

    refused("optim.z_loss=0.1 belongs to the built-in loss", lambda decoder: None, optim__z_loss=0.1)
    refused("a partial has no name of its own", functools.partial(print))
    refused("model.block='gptjax.model.block:nothing': wanted module:name", model__block="gptjax.model.block:nothing")
    refused("data.validation held=.*holds no text", data__validation=(f"held={tmp_path / 'empty.txt'}",))
    refused("data.weights=.*wanted one for each source where data.weights_are is", data__weights_are="shares")
    with pytest.raises(InputError, match="loss='nowhere:f': wanted module:name"):
        gptjax.train(config(tmp_path / "run", text, loss="nowhere:f"))


@pytest.mark.slow
def test_averaged_weights_are_what_a_run_evaluates_and_generates_with(plain, tmp_path, text):
    model = gptjax.train(config(tmp_path / "ema", text, log_norms_every=2, optim__ema=0.5))
    assert metrics(model, "loss") == metrics(plain, "loss"), "averaging does not change training"
    changed = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), model.params, plain.params)
    assert max(jax.tree.leaves(changed)) > 1e-6
    known = metrics(model, "eval_loss")[-1]
    assert gptjax.evaluate(model, 8)["eval_loss"] == pytest.approx(known, rel=1e-6)
    assert gptjax.evaluate(plain, 8)["eval_loss"] != known


@pytest.mark.slow
def test_a_run_starts_from_anothers_weights_with_a_schedule_of_its_own(plain, tmp_path, text):
    more = {"init": str(plain.run.folder), "data__length": 64, "steps": 3, "optim__learning_rate": 1e-9}
    model = gptjax.train(config(tmp_path / "longer", text, **more))
    for name, x in plain.params["layers"].items():
        np.testing.assert_allclose(model.params["layers"][name], x, atol=1e-6)
    assert metrics(model, "updates") == [1, 2, 3]
    assert metrics(model, "loss")[0] < metrics(plain, "loss")[0] - 0.005, "it knows what the other one learned"


def test_a_run_does_not_start_from_weights_that_mean_something_else_in_it(tmp_path, text):
    old = config(tmp_path / "old", text)

    def refused(**settings) -> str:
        with pytest.raises(InputError) as e:
            _check_settings(old, config(tmp_path / "new", text, init="old", **settings))
        assert str(e.value).startswith("init='old': its weights are of another model: ") and "\n" not in str(e.value)
        return str(e.value)

    assert "model.activation was 'swiglu', got 'gelu'; wanted what was" in refused(model__activation="gelu")
    for other in ({"norm": "layernorm"}, {"logit_softcap": 30.0}, {"mup_base_width": 16}, {"positions": "learned"}):
        ((name, value),) = other.items()
        assert f"model.{name} was {getattr(old.model, name)!r}, got {value!r}" in refused(**{f"model__{name}": value})
    reach = {"model__rope_theta": 5e5, "model__window": 16}
    assert refused(**reach).endswith(
        "model.window was 0, got 16; wanted what was; with a longer data.length it may differ"
    )
    assert "model.qk_norm" in refused(model__qk_norm=not old.model.qk_norm, data__length=64, **reach)
    fits = {"model__dtype": "bfloat16", "model__dropout": 0.2, "model__remat": "full", "model__attention": "plain"}
    for settings in (fits, {"data__length": 64, **reach}):
        _check_settings(old, config(tmp_path / "new", text, init="old", **settings))


def test_a_run_that_can_not_be_started_from_is_refused_before_its_text_is_prepared(tmp_path, text):
    begun = Run.open(tmp_path / "begun", config(tmp_path / "begun", text))
    for init, said in ((tmp_path / "nowhere", "wanted the folder of a run"), (begun.folder, "has no checkpoint")):
        with pytest.raises(InputError, match=said):
            gptjax.train(config(tmp_path / "new", text, init=str(init)))
    assert not (tmp_path / "new").exists()


def test_a_weight_of_another_shape_says_which_setting_is_wrong(tmp_path, text):
    old = SimpleNamespace(params={"embed_VD": np.zeros((8, 4))})
    refused = {(6, 4): "tokenizer.vocab_size may grow, not shrink", (8, 6): "the model's settings must be"}
    for shape, said in refused.items():
        with pytest.raises(InputError, match=f"its embed_VD has shape .*; {said}"):
            _check_shapes(old, {"embed_VD": np.zeros(shape)}, config(tmp_path, text, init="old"))


@pytest.mark.slow
def test_a_run_starts_from_one_with_fewer_token_ids_whose_meanings_are_the_same(tmp_path, text):
    tokenizers = pytest.importorskip("tokenizers")

    def bpe(size: int, reverse: bool = False) -> Path:
        """A byte-level BPE; trained on the same text, a larger one begins with a smaller one."""
        made = tokenizers.ByteLevelBPETokenizer()
        lines = text.read_text().splitlines()
        made.train_from_iterator([x[::-1] for x in lines] if reverse else lines, size, special_tokens=["<|endoftext|>"])
        path = tmp_path / f"bpe-{size}-{reverse}" / "tokenizer.json"
        path.parent.mkdir()
        made.save(str(path))
        return path

    def settings(path: Path, size: int) -> dict:
        return {"tokenizer__kind": "huggingface", "tokenizer__path": str(path), "tokenizer__vocab_size": size}

    # As many ids as bytes have, and norms as in `plain`: its programs are there already.
    first = gptjax.train(config(tmp_path / "first", text, **settings(bpe(258), 258), log_norms_every=2))
    more = {"init": str(first.run.folder), "steps": 1, "optim__learning_rate": 1e-9, "model__tied": True}
    larger = gptjax.train(config(tmp_path / "larger", text, **settings(bpe(330), 330), **more))
    np.testing.assert_allclose(larger.params["embed_VD"][:258], first.params["embed_VD"][:258], atol=1e-6)
    assert larger.params["embed_VD"].shape == (384, 16)
    with pytest.raises(InputError, match="has another tokenizer, whose 258 ids mean other tokens"):
        gptjax.train(config(tmp_path / "other", text, **settings(bpe(300, reverse=True), 300), **more))


def test_a_module_in_the_working_folder_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "own_parts_here.py").write_text("def answer():\n    return 42\n")
    monkeypatch.chdir(tmp_path)
    assert resolve("own_parts_here:answer", "loss")() == 42
    (tmp_path / "broken_parts_here.py").write_text("1 / 0")
    with pytest.raises(InputError, match="loss='broken_parts_here:answer': wanted .*ZeroDivisionError: division"):
        resolve("broken_parts_here:answer", "loss")
