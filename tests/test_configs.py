"""Every shipped recipe builds, on its mesh, with nothing allocated; its parameter count is the paper's."""

from pathlib import Path

import jax
import pytest

from gptjax.config import TrainConfig
from gptjax.decoder import init_params, make_decoder
from gptjax.flags import load_recipe, origins, parse
from gptjax.optim import make_optimizer, make_schedule
from gptjax.run import load_config
from gptjax.scaling.counts import parameters
from gptjax.settings import InputError, build, leaves
from gptjax.sharding import make_mesh, shardings
from gptjax.train import make_init

RECIPES = sorted(p.stem for p in (Path(__file__).parent.parent / "configs").glob("*.py"))
PAPER = {"gpt2_124m": 124_439_808, "gpt2_1p5b": 1_557_611_200, "llama_1b": 1_235_814_400}


def recipe(name: str) -> TrainConfig:
    return load_recipe(name).config("pretrain")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_and_shards_on_its_mesh_with_nothing_allocated(name):
    config = recipe(name)
    decoder, mesh = make_decoder(config), make_mesh(config.mesh)
    tx = make_optimizer(config.optim, make_schedule(config.optim, config.steps))
    shapes = jax.eval_shape(make_init(init_params(decoder), tx), 0)
    where = shardings(shapes, mesh)
    per_device = sum(s.shard_shape(x.shape) != x.shape for x, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(where)))
    assert per_device > 0 or config.mesh.fsdp == config.mesh.tensor == 1
    counted = parameters(config.model, config.tokenizer.vocab_size, config.data.length)
    assert sum(x.size for x in jax.tree.leaves(shapes.params)) == counted["total_padded"]


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_has_the_parameters_of_its_paper(name):
    config = recipe(name)
    assert parameters(config.model, config.tokenizer.vocab_size, config.data.length)["total"] == PAPER[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_config_survives_its_flat_form(name):
    config = recipe(name)
    assert build(TrainConfig, dict(leaves(config))) == config


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.widht", "3"], "there is no setting --model.widht; did you mean --model.width?"),
        (["--widht", "3"], "there is no setting --widht; did you mean --model.width?"),
        (["--steps", "abc"], "--steps: got 'abc', wanted a whole number"),
        (["--optim.learning-rate", "fast"], "--optim.learning-rate: got 'fast', wanted a number"),
        (["--model.norm", "batchnorm"], "invalid choice 'batchnorm'.*rmsnorm"),
        (["--steps"], "Missing value for argument '--steps'"),
        (["--model.width", "130", "--model.num-heads", "4"], "model.width=130: wanted a multiple of model.num_heads=4"),
        (
            ["--data.batch-size", "3", "--optim.accumulate", "2"],
            "data.batch_size=3 is not divisible by optim.accumulate=2",
        ),
        (["--optim.learning-rate", "nan"], "optim.learning_rate=nan: wanted a finite number above 0"),
        (["--optim.learning-rate=-1"], "optim.learning_rate=-1.0: wanted a finite number above 0"),
        (["--steps=-5"], "steps=-5: wanted a finite number above 0"),
        (["--mesh.tensor", "0"], "mesh.tensor=0: wanted a number of devices"),
        (["--profile", "7"], "profile='7': wanted FIRST:LAST"),
        (["--tokenizer.kind", "bytes"], "tokenizer.vocab_size=.* add --tokenizer.vocab-size 258"),
        (["stray"], "Unrecognized options: stray"),
    ],
)
def test_a_bad_setting_is_one_clear_line(args, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(recipe("quickstart"), args, "gptjax pretrain quickstart")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_any_setting_can_be_given_by_its_dotted_name():
    args = "--model.num-layers 3 --model.queries_per_kv 2 --no-tensorboard --generate.prompt a b --optim.schedule=wsd"
    config = parse(recipe("quickstart"), args.split(), "gptjax pretrain quickstart")
    assert (config.model.num_layers, config.model.queries_per_kv, config.tensorboard) == (3, 2, False)
    assert config.generate.prompt == ("a", "b") and config.optim.schedule == "wsd"
    given = [n for n, o in origins(TrainConfig(), recipe("quickstart"), config).items() if o == "command line"]
    assert given == ["tensorboard", "model.num_layers", "model.queries_per_kv", "optim.schedule", "generate.prompt"]


def test_a_recipe_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such recipe.*quickstart"):
        load_recipe("nowhere")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match="has no function pretrain"):
        load_recipe(str(tmp_path / "empty.py")).config("pretrain")
    (tmp_path / "broken.py").write_text("import nowhere_at_all")
    with pytest.raises(InputError, match="the recipe failed with ModuleNotFoundError"):
        load_recipe(str(tmp_path / "broken.py"))


def test_a_run_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="config.json"):
        load_config(tmp_path)
