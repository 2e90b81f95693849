"""Every shipped recipe builds, on its mesh, with nothing allocated; its parameter count is the paper's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shipped import EVERY, FOLDER, NAMES, SIZES, recipe

from gptjax.config import STAGES, GrpoConfig, PpoConfig, ShowConfig, TrainConfig, TrainTokenizerConfig
from gptjax.config.command_line import load_recipe, origins, parse, take
from gptjax.config.section import InputError
from gptjax.diagnostics.plan.search import SAFE, Planner
from gptjax.model.counts import padded_vocab, parameters
from gptjax.runtime.hardware import topology

# As the papers print them. GPT-3's 350M and 2.7B are rounded further than 1 % from what the table's own layers and
# widths make: 355.9M and 2.65B.
PAPER = {
    "gpt2 --size 124m": (124_439_808, 0), "gpt2 --size 355m": (354_823_168, 0), "gpt2 --size 774m": (774_030_080, 0),
    "gpt2 --size 1.5b": (1_557_611_200, 0), "gpt3 --size 125m": (125e6, 0.01), "gpt3 --size 350m": (350e6, 0.017),
    "gpt3 --size 760m": (760e6, 0.01), "gpt3 --size 1.3b": (1.3e9, 0.013), "gpt3 --size 2.7b": (2.7e9, 0.018),
    "gpt3 --size 6.7b": (6.7e9, 0.01), "gpt3 --size 13b": (13e9, 0.013), "gpt3 --size 175b": (175e9, 0.01),
    "llama_1b": (1_235_814_400, 0), "llama_8b": (8_030_261_248, 0),
}  # fmt: skip


@pytest.mark.slow
def test_every_recipe_builds_on_its_mesh_with_nothing_allocated():
    # A process of its own, for the number of fake devices is fixed when jax starts: 512, as GPT-3 175B is sharded.
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=512", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(Path(__file__).parent / "build_recipes.py"), *EVERY]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    built = {line["recipe"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert set(built) == set(EVERY)
    for name, line in built.items():
        config = recipe(name)
        counted = parameters(config.model, padded_vocab(config.tokenizer.vocab_size), config.data.length)
        assert line["parameters"] == counted["total"]
        # Parameters and optimizer state, but for norms and scalars, are split over all devices that share them.
        assert line["state_bytes_a_device"] <= 1.04 * line["state_bytes"] / (config.mesh.fsdp * config.mesh.tensor)
        assert line["step_keeps_the_state"]


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_has_the_parameters_of_its_paper(name):
    config, (wanted, tolerance) = recipe(name), PAPER[name]
    total = parameters(config.model, config.tokenizer.vocab_size, config.data.length)["total"]
    assert abs(total - wanted) <= tolerance * wanted


def test_the_gpt3_recipes_are_the_table_of_the_paper():
    # Brown et al. 2020, table 2.1: layers, width, heads, batch in tokens, learning rate. Two rows contradict themselves
    # there, for which see the recipe: 1.3b has 24 heads, 13b a width of 5,140.
    table = {
        "125m": (12, 768, 12, 0.5e6, 6.0e-4), "350m": (24, 1024, 16, 0.5e6, 3.0e-4),
        "760m": (24, 1536, 16, 0.5e6, 2.5e-4), "1.3b": (24, 2048, 16, 1e6, 2.0e-4),
        "2.7b": (32, 2560, 32, 1e6, 1.6e-4), "6.7b": (32, 4096, 32, 2e6, 1.2e-4),
        "13b": (40, 5120, 40, 2e6, 1.0e-4), "175b": (96, 12288, 96, 3.2e6, 0.6e-4),
    }  # fmt: skip
    for size, (layers, width, heads, tokens, rate) in table.items():
        config = recipe(f"gpt3 --size {size}")
        assert (config.model.num_layers, config.model.width, config.model.num_heads) == (layers, width, heads)
        assert config.optim.learning_rate == rate
        assert config.data.batch_size * config.data.length == pytest.approx(tokens, rel=0.05)


TUNED = [
    (path.stem, stage)
    for path in sorted(FOLDER.glob("*.py"))
    for stage in STAGES
    if stage != TrainConfig.stage and re.search(rf"^def {stage}\(", path.read_text(), re.M)
]


@pytest.mark.parametrize(("name", "stage"), TUNED)
def test_a_recipe_holds_the_settings_of_each_stage_that_it_names(name, stage):
    config = load_recipe(name).config(stage)
    assert type(config) is STAGES[stage]
    assert config.run_dir not in (TrainConfig().run_dir, config.init)


def test_the_quickstart_trains_its_policies_on_one_reward_for_as_many_tokens():
    grpo, ppo = (load_recipe("quickstart").config(stage) for stage in ("grpo", "ppo"))
    assert isinstance(grpo, GrpoConfig) and isinstance(ppo, PpoConfig)
    assert (ppo.init, ppo.beta, ppo.data, ppo.rewards) == (grpo.init, grpo.beta, grpo.data, grpo.rewards)
    assert ppo.rollout.max_new_tokens == grpo.rollout.max_new_tokens
    assert ppo.steps * ppo.data.batch_size <= grpo.steps * grpo.data.batch_size
    assert ppo.init == load_recipe("quickstart").config("pretrain").run_dir


def planned(name: str) -> list[tuple[str, str]]:
    """The `gptjax plan` commands of a recipe's docstring: the words of the recipe with its flags, and the machine."""
    commands = re.findall(r"^    gptjax plan configs/(\w+)\.py (.*)$", load_recipe(name).doc, re.M)
    assert all(named == name for named, _ in commands)
    return [
        (f"{name} {' '.join(rest)}", place) for place, rest in (take(line.split(), "topology") for _, line in commands)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_each_machine_that_its_docstring_names_and_is_not_bound_by_its_network(name):
    config, commands = recipe(name), planned(name)
    assert commands or config.tokenizer.vocab_size < 8192, "laid out for a laptop's CPU, or the docstring has a machine"
    assert [words.split()[2] for words, _ in commands] == SIZES[name].split() if name in SIZES else True
    for words, place in commands:
        where = topology(place)
        counted = Planner(recipe(words), where).as_written()
        assert counted.config.model.attention == {"h100": "cudnn"}.get(place.split(":")[0], "splash"), words
        assert counted.memory.total <= SAFE * where.chip.memory, (words, place, counted.memory.total / 2**30)
        assert counted.speed.bound == "compute", (words, place, counted.speed)


def test_a_dial_makes_a_recipe_of_any_size():
    small, large = (load_recipe("modern").config("pretrain", size) for size in ("4", "20"))
    assert (small.model.num_layers, small.model.width, large.model.width) == (4, 256, 1280)
    assert small.steps < large.steps
    with pytest.raises(InputError, match="--size deep: wanted a whole number"):
        load_recipe("modern").config("pretrain", "deep")
    with pytest.raises(InputError, match="--size 5: wanted an even depth"):
        load_recipe("modern").config("pretrain", "5")
    with pytest.raises(InputError, match="--size 1b: wanted one of 124m, 355m, 774m, 1.5b"):
        load_recipe("gpt2").config("pretrain", "1b")
    with pytest.raises(InputError, match="has no dial"):
        load_recipe("quickstart").config("pretrain", "4")


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
        (["--steps=-5"], "steps=-5: wanted a number from 1 to 2,147,483,647"),
        (["--steps", "99999999999"], "steps=99999999999: wanted a number from 1"),
        (["--optim.warmup-steps", "99999999999"], "optim.warmup_steps=99999999999: wanted a number from 0"),
        (["--data.batch-size", "80000000000"], r"data.batch_size=80000000000: wanted fewer than 2\^31 tokens a step"),
        (["--mesh.tensor", "0"], "mesh.tensor=0: wanted a number of devices"),
        (["--profile", "7"], "profile='7': wanted FIRST:LAST"),
        (["--profile", "9:12", "--steps", "8"], "profile='9:12': wanted a FIRST of at most steps=8"),
        (["--tokenizer.kind", "bytes"], "tokenizer.vocab_size=.* add --tokenizer.vocab-size 258"),
        (["stray"], "Unrecognized options: stray"),
    ],
)
def test_a_bad_setting_is_one_clear_line(args, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(recipe("quickstart"), args, "gptjax pretrain quickstart")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_any_setting_can_be_given_by_its_dotted_name():
    args = "--model.num-layers 3 --model.queries_per_kv 2 --sinks --generate.prompt a b --optim.schedule=wsd"
    config = parse(recipe("quickstart"), args.split(), "gptjax pretrain quickstart")
    assert (config.model.num_layers, config.model.queries_per_kv, config.sinks) == (3, 2, ())
    assert config.generate.prompt == ("a", "b") and config.optim.schedule == "wsd"
    given = [n for n, o in origins(TrainConfig(), recipe("quickstart"), config).items() if o == "command line"]
    assert given == ["sinks", "model.num_layers", "model.queries_per_kv", "optim.schedule", "generate.prompt"]


RETURNS = "from gptjax.config import *\ndef pretrain():\n    return "


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            RETURNS + "TrainConfig(\n        model=ModelConfig(widht=3))",
            r"r.py:4: pretrain\(\) failed with TypeError: .*'widht'",
        ),
        (RETURNS + "{'steps': 3}", r"pretrain\(\) returned {'steps': 3}; wanted a gptjax.config.TrainConfig"),
        (RETURNS + "TrainConfig(steps=1e5)", "steps=100000.0: wanted a value of type int"),
        (RETURNS + "TrainConfig(loss=print)", "loss=<built-in function print>: wanted a value of type str"),
        ("", "has no function pretrain"),
        ("import nowhere_at_all", "r.py:1: the recipe failed with ModuleNotFoundError"),
        (None, "no such recipe.*quickstart"),
    ],
)
def test_a_recipe_that_is_none_or_gives_no_config_is_refused(text, said, tmp_path):
    if text is not None:
        (tmp_path / "r.py").write_text(text)
    with pytest.raises(InputError, match=said):
        load_recipe("nowhere" if text is None else str(tmp_path / "r.py")).config("pretrain")


def test_a_recipe_may_write_a_list_for_a_tuple_and_is_the_same_when_it_is_read_back(tmp_path):
    made = "TrainConfig(optim=OptimConfig(learning_rate=1), checkpoint=CheckpointConfig(at=[3, 4]))"
    (tmp_path / "r.py").write_text(RETURNS + made)
    config = load_recipe(str(tmp_path / "r.py")).config("pretrain")
    assert repr((config.checkpoint.at, config.optim.learning_rate)) == "((3, 4), 1.0)"


@pytest.mark.parametrize(
    ("default", "args", "message"),
    [
        (ShowConfig(), ["--step", "9999999999999999999"], "step=9999999999999999999: wanted a number from 1"),
        (TrainTokenizerConfig(), ["--validation-fraction", "nan"], "validation_fraction=nan: wanted a share above 0"),
        (TrainTokenizerConfig(), ["--validation-fraction=-1"], "validation_fraction=-1.0: wanted a share above 0"),
        (TrainTokenizerConfig(), ["--vocab-size", "100"], "vocab_size=100: wanted at least 300"),
        (TrainTokenizerConfig(), ["--source", ""], "source='': wanted a path or a name"),
    ],
)
def test_a_bad_setting_of_another_verb_is_one_clear_line(default, args, message):
    with pytest.raises(InputError, match=f"^{message}"):
        parse(default, args, "gptjax")
