"""lm-eval's own tasks through our model class, held to its class for transformers; needs torch and lm_eval.

pip install 'gptjax[peers]' && pytest tests/test_lm_eval.py -m peers
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from awkward_texts import SHAKESPEARE

from gptjax.config import ImportConfig
from gptjax.interop.importing import import_run

FIXTURES = Path(__file__).parent / "fixtures"
BEGIN, END, ROLE, TURN = "<s>", "</s>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, vocab_size: int, begins: bool, chats: bool) -> None:
    """Writes a byte-level BPE into a model's folder; with `begins` it puts <s> in front of every text.

    With `chats` it has ChatML's template, whose end of a turn ends a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False,
                                  special_tokens=["<unk>", BEGIN, END, ROLE, TURN])  # fmt: skip
    made.train_from_iterator([SHAKESPEARE[:60_000]], trainer)
    if begins:
        made.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    made.save(str(folder / "tokenizer.json"))
    end = TURN if chats else END
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": end}
    settings |= {"chat_template": CHATML} if chats else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": begins}))


def write_tasks(folder: Path) -> list[dict]:
    """Tasks for lm-eval on files of our own: multiple choice, the last word, whole texts, and generation."""
    lines = [line.strip() for line in SHAKESPEARE.splitlines() if 30 < len(line.strip()) < 80][:40]
    rows = [
        {"question": a, "choices": [b, c, "to be or not to be"], "answer": i % 3, "text": f"{a}\n{b}\n{c} " * 5}
        for i, (a, b, c) in enumerate(zip(lines[::4], lines[1::4], lines[2::4]))
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test",
              "doc_to_text": "Question: {{question}}\nAnswer:", "num_fewshot": 0}  # fmt: skip
    mean = {"aggregation": "mean", "higher_is_better": True}
    per_word = {"aggregation": "weighted_perplexity", "higher_is_better": False}
    return [
        common | {"task": "choices", "output_type": "multiple_choice", "doc_to_choice": "choices",
                  "doc_to_target": "answer", "metric_list": [{"metric": "acc_norm"} | mean]},
        common | {"task": "shots", "output_type": "multiple_choice", "doc_to_choice": "choices", "num_fewshot": 1,
                  "doc_to_target": "answer", "metric_list": [{"metric": "acc"} | mean], "fewshot_split": "test"},
        common | {"task": "word", "output_type": "loglikelihood", "doc_to_text": "{{question}}",
                  "doc_to_target": "{{choices[0]}}", "metric_list": [{"metric": "acc"} | mean]},
        common | {"task": "texts", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target":
                  "{{text}}", "metric_list": [{"metric": "word_perplexity"} | per_word]},
        common | {"task": "words", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
                  "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False},
                  "metric_list": [{"metric": "exact_match"} | mean]},
    ]  # fmt: skip


def answers(model, tasks: list[dict], chats: bool) -> dict[str, list]:
    """The model's answers to every request of the tasks, by task and number."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    result = lm_eval.simple_evaluate(
        model=model, tasks=tasks, log_samples=True, bootstrap_iters=0, random_seed=0, apply_chat_template=chats,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    assert result is not None
    return {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in result["samples"].items()
    }


@pytest.mark.peers
@pytest.mark.parametrize(
    "begins, chats", [(False, False), (True, False), (False, True)], ids=["bare", "begins", "chats"]
)
def test_tasks_of_lm_eval_have_the_answers_of_its_class_for_transformers(tmp_path, begins, chats, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    huggingface = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)
    from gptjax.interop.lm_eval import GptjaxLM

    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "tiny_random_llama", folder)
    write_tokenizer(folder, 512, begins, chats)
    import_run(folder, tmp_path / "run", ImportConfig(template="chatml" if chats else ""))
    tasks = write_tasks(tmp_path)
    theirs = answers(huggingface.HFLM(str(folder), device="cpu", dtype="float32", batch_size=4), tasks, chats)
    with jax.default_matmul_precision("highest"):
        ours = answers(GptjaxLM(str(tmp_path / "run"), batch_size=4), tasks, chats)
    assert ours.keys() == theirs.keys() == {task["task"] for task in tasks}
    assert ours["words"] == theirs["words"] and any(text for [[text]] in ours["words"])
    for name in ("choices", "shots", "word", "texts"):
        numbers = [[x for one in resps for x in numbers_of(one)] for resps in ours[name]]
        wanted = [[x for one in resps for x in numbers_of(one)] for resps in theirs[name]]
        assert numbers == [pytest.approx(row, abs=1e-4) for row in wanted], name


def numbers_of(response) -> list[float]:
    """A log-likelihood, and whether its tokens are the likeliest where it says so, as numbers."""
    values = response[0]
    return [float(x) for x in values] if isinstance(values, tuple | list) else [float(values)]


def test_without_lm_eval_one_line_names_the_extra(tmp_path):
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval/__init__.py").write_text("raise ImportError")
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "gptjax.interop.lm_eval"], env=os.environ | {"PYTHONPATH": paths}, capture_output=True,
        text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "gptjax[eval]" in done.stderr
