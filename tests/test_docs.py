"""The pages for users: what they show runs, what they name exists, and what is generated is fresh."""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptjax.cli import VERBS
from gptjax.config import STAGES, TrainConfig, TuneConfig
from gptjax.config.command_line import load_recipe, parse, take

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.M | re.S)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Settings that make every training run of a page tiny; the page's own code stays as it is.
TINY = {
    "steps": 2, "model.num_layers": 1, "model.width": 32, "model.num_heads": 2, "model.unroll": 1, "data.length": 32,
    "data.batch_size": 4, "data.source": "text.txt", "tokenizer.kind": "bytes", "tokenizer.vocab_size": 258,
    "evaluate.max_rows": 8, "generate.max_new_tokens": 4, "sinks": (), "model.dtype": "float32",
}  # fmt: skip
OTHERS = ("export", "printf", "tensorboard", "pre-commit", "curl", "lm_eval")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title where it has one, its text and its first line."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: str, *languages: str) -> list[Block]:
    text, found = (ROOT / page).read_text(), []
    for match in FENCE.finditer(text):
        indent, language, info, body = match.groups()
        if language in languages:
            title = re.search(r'title="([^"]*)"', info)
            body = re.sub(rf"^{indent}", "", body, flags=re.M)
            found.append(Block(language, title[1] if title else "", body, text.count("\n", 0, match.start()) + 2))
    return found


def driver(folder: Path, page: str, tiny: dict) -> None:
    """Runs the Python blocks of a page one after the other in this process, as a user who pastes them does."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    from gptjax import api

    train, size = api.train, {"steps": 2, "sinks": (), "model.dtype": "float32", "data.batch_size": 4}

    def smaller(config):
        return api.override(config, size if isinstance(config, TuneConfig) else tiny)

    api.train = lambda config, **parts: train(smaller(config), **parts)
    if page == "shared":
        api.train(api.recipe("quickstart"))
        return
    names = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)


def run_blocks(page: str, folder: Path, cache: Path) -> None:
    code = f"import test_docs; test_docs.driver(test_docs.Path({str(folder)!r}), {page!r}, {TINY!r})"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a short text and a tiny run in runs/quickstart, which pages load."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 200)
    run_blocks("shared", folder, folder / "cache")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in NAMES if blocks(name, "python")])
def test_every_python_block_runs_as_it_is_pasted(page, shared, tmp_path, record_property):
    subprocess.run(["cp", "-r", f"{shared}/text.txt", f"{shared}/runs", tmp_path], check=True)
    shown = blocks(page, "python")
    for block in shown:
        if block.title:
            (tmp_path / block.title).write_text(block.text)
    run_blocks(page, tmp_path, shared / "cache")
    for block in shown:
        if "def pretrain(" in block.text:
            assert isinstance(load_recipe(str(tmp_path / block.title)).config("pretrain", ""), TrainConfig)
    record_property("summary", f"{page}: {len(shown)} Python blocks ran")


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block as words; comments, line ends and what is piped or chained are cut."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for command in re.split(r"\s(?:&&|\|\||;|&|\|)(?=\s|$)", re.sub(r"(^|\s)#.*", "", line)):
            words = [word for word in shlex.split(command) if not re.match(r"\d?>", word)]
            while words and (re.match(r"[A-Z_]+=", words[0]) or words[0] in ("time", "nohup", "srun", "if", "(")):
                words = words[1:]
            if words:
                found.append(words)
    return found


@pytest.mark.parametrize("page", [name for name in NAMES if blocks(name, "bash")])
def test_every_shell_command_is_one_that_the_parser_takes(page, tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
    for folder in ("configs", "launch", "benchmarks", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    count = 0
    for block in blocks(page, "bash"):
        for words in commands(block.text):
            try:
                check(words)
            except (Exception, SystemExit) as e:
                pytest.fail(f"{page}:{block.line}: {shlex.join(words)}: {type(e).__name__}: {e}")
            count += 1
    record_property("summary", f"{page}: {count} shell commands checked")


def check(words: list[str]) -> None:
    """Raises where a command has a verb, a flag, a value, a recipe, a file or an extra that is not there."""
    first, *args = words
    if first == "gptjax" or words[:3] == ["python", "-m", "gptjax"]:
        check_verb(args if first == "gptjax" else words[3:])
    elif first == "pip" or words[:3] == ["python", "-m", "pip"]:
        check_extras(words)
    elif first == "python" and args[:2] == ["-m", "venv"]:
        assert len(args) == 3, "wanted one folder"
    elif first == "python" and args[0] == "-m" and args[1].startswith("gptjax."):
        assert (ROOT / args[1].replace(".", "/")).with_suffix(".py").is_file(), f"there is no {args[1]}"
    elif first in ("python", "bash", "sbatch"):
        check_script(first, args)
    elif first == "pytest":
        check_tests(args)
    elif first == "mkdocs":
        assert args[0] in ("build", "serve"), args[0]
    elif first in (".", "source"):
        assert args[0].endswith("/activate"), args[0]
    else:
        assert first in OTHERS, f"{first} is no command that this test knows"


def check_verb(args: list[str]) -> None:
    if args[0] in ("--help", "--version"):
        return
    verb = next((" ".join(args[:n]) for n in (2, 1) if " ".join(args[:n]) in VERBS), None)
    assert verb, f"there is no verb {args[0]}"
    rest = args[len(verb.split()) :]
    if "--help" in rest:
        return
    configs = make_settings().VERBS
    words = (
        0
        if verb in ("prepare", "tokenizer train", "verify", "doctor")
        else 2
        if verb in ("import", "export", "inspect")
        else 1
    )
    assert len(rest) >= words and not any(word.startswith("-") for word in rest[:words]), "a word is missing"
    names, rest = rest[:words], rest[words:]
    if verb == "fit":
        rest = rest[next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest)) :]
    if verb in (*STAGES, "plan", "sweep") and not names[0].startswith("runs/"):  # a run goes on
        recipe = load_recipe(names[0])
        size = ""
        for flag in ("size", "topology", "json", "out", "compiles") if verb == "plan" else ("size",):
            value, rest = take(rest, flag)
            size = value if flag == "size" else size
        if verb != "sweep":
            parse(recipe.config(verb if verb in STAGES else "pretrain", size), rest, "")
            return
    if verb in configs:
        parse(configs[verb](), rest, "")
    else:
        assert not rest, f"gptjax {verb} has no {rest[0]}"


def check_extras(words: list[str]) -> None:
    known = PROJECT["project"]["optional-dependencies"]
    for word in words:
        for extra in re.findall(r"\[([\w,-]+)\]", word):
            assert set(extra.split(",")) <= set(known), f"{word}: pyproject.toml has no such extra"


def check_script(first: str, args: list[str]) -> None:
    args = list(args)
    flags = []
    while args and first == "sbatch" and not args[0].endswith(".sbatch"):
        flags.append(args.pop(0))
    if args[0] in ("-c", "-"):
        return
    script, rest = args[0], args[1:]
    path = ROOT / script
    assert path.is_file(), f"{script} is not there"
    if script == "launch/supervise.py" and "--" in rest:
        check(rest[rest.index("--") + 1 :])
        rest = rest[: rest.index("--")]
    if path.suffix == ".py":
        known = set(re.findall(r'"(--[\w-]+)"', path.read_text())) | {"--help"}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known, f"{script} knows {known}"
    recipes = [i for i, word in enumerate(rest) if word.startswith("configs/") and word.endswith(".py")]
    if recipes and path.suffix != ".py":
        verb = "sweep" if path.name == "sweep.sbatch" else "pretrain"
        check_verb([verb, *rest[recipes[0] :]])


def check_tests(args: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    for flag in ("-m", "-k", "-n"):
        parser.add_argument(flag, default="")
    parser.add_argument("files", nargs="*")
    given = parser.parse_args(args)
    tests = [ROOT / file for file in given.files] or list((ROOT / "tests").glob("test_*.py"))
    markers = {marker.split(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(re.findall(r"\w+", given.m)) - {"not", "and", "or"} <= markers, given.m
    names = " ".join(test.read_text() for test in tests)
    for word in set(re.findall(r"\w+", given.k)) - {"not", "and", "or"}:
        assert word in names, f"-k {word} matches no test"


def make_settings() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "make_settings.py")))


def test_the_settings_page_is_what_the_docstrings_say():
    module = make_settings()
    assert module.PAGE.read_text() == module.page(), "stale; run: python docs/make_settings.py"
    assert set(module.VERBS) <= set(VERBS)


def test_every_setting_has_a_docstring():
    module = make_settings()
    for cls in module.VERBS.values():
        fields = {name for name, kind in vars(cls()).items() if not hasattr(kind, "section")}
        assert set(module.field_docs(cls)) >= fields


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_readme_has_at_most_110_lines_of_at_most_140_columns(page):
    lines = (ROOT / page).read_text().splitlines()
    assert len(lines) <= 110
    assert not [line for line in lines if len(line) > 140 and not line.startswith("|")]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", re.sub(FENCE, "", page.read_text()), re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).strip()
        found.add(re.sub(r"[ -]+", "-", words))
    return found


@pytest.mark.parametrize("page", NAMES)
def test_links_and_files_that_a_page_names_are_there(page):
    path = ROOT / page
    text = re.sub(FENCE, "", path.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        there = path if not file else (path.parent / file)
        assert there.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(there), f"{page} links to {target}; {there.name} has {sorted(anchors(there))}"
        if page.startswith("docs/"):
            assert (ROOT / "docs") in there.resolve().parents, f"{page} links to {target}, which is not on the site"
    rooms = "|".join(p.name for p in ROOT.iterdir() if p.is_dir())
    for named in re.findall(rf"`((?:{rooms})/[\w./-]+)`", text):
        made = ("runs/", "dist/", "build/")
        assert named.startswith(made) or (ROOT / named).exists(), f"{page} names {named}, which is not there"


def test_every_page_is_in_the_navigation():
    nav = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().split("nav:")[1])
    assert sorted(nav) == sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))


def test_the_rooms_of_the_readme_are_those_of_the_package():
    shown = re.search(r"```text\n    ?gptjax/.*?```|```text\ngptjax/.*?```", (ROOT / "README.md").read_text(), re.S)
    assert shown, "README.md has no tree"
    rooms = {p.parent.name for p in (ROOT / "gptjax").glob("*/*.py")}
    assert rooms <= set(re.findall(r"^ +(\w+)/", shown[0], re.M)), "a room is missing in the README's tree"


def test_a_metric_that_the_training_page_explains_is_one_that_a_run_writes():
    text = (ROOT / "docs" / "training.md").read_text()
    source = " ".join(p.read_text() for p in (ROOT / "gptjax").rglob("*.py"))
    for name in re.findall(r"^\| `(\w+)` \|", text.split("## metrics.jsonl")[1].split("\n## ")[0], re.M):
        assert name in source, f"docs/training.md explains {name}"


def test_a_plot_that_the_pages_show_is_that_of_the_report():
    shown, plots = ROOT / "docs" / "assets", ROOT / "benchmarks" / "results" / "scaling_ladder" / "fit" / "plots"
    assert (shown / "isoflop.png").read_bytes() == (plots / "isoflop.png").read_bytes()
