"""Laws of tuning against TRL: the same weights, data, order and settings give the same twenty losses.

pip install 'gptjax[peers]' trl && pytest tests/test_trl.py -m peers
"""

import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax.api import export, load
from gptjax.cli import main
from gptjax.config import DataConfig, DpoConfig, ModelConfig, SftConfig, TokenizerConfig, TrainConfig
from gptjax.config.section import leaves
from gptjax.data.chats import ChatData
from gptjax.data.pairs import PreferenceData
from gptjax.data.permutation import shuffled
from gptjax.model.decoder import init_params, make_decoder
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run, load_config
from gptjax.tokenizer import BytesTokenizer

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("compile_cache")]
STEPS, ROWS, LENGTH = 20, 8, 96
LLAMA = ModelConfig(
    num_layers=2, width=64, num_heads=4, queries_per_kv=2, positions="rope", norm="rmsnorm", activation="swiglu",
    biases=False, tied=False, dtype="float32",
)  # fmt: skip
SETTINGS = f"""--tokenizer.template llama2 --model.dtype float32 --model.dropout 0 --data.length {LENGTH}
--data.batch-size {ROWS} --steps {STEPS} --evaluate.every {STEPS} --checkpoint.every {STEPS} --no-sample --sinks
--optim.learning-rate 1e-3 --optim.schedule cosine --optim.warmup-steps 0 --optim.final-fraction 0.1 --optim.beta1 0.9
--optim.beta2 0.95 --optim.weight-decay 0.1 --optim.clip-norm 1 --mesh.data {ROWS}""".split()
# The same, as transformers names it.
THEIRS = dict(
    per_device_train_batch_size=ROWS, max_steps=STEPS, learning_rate=1e-3, lr_scheduler_type="cosine_with_min_lr",
    lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_steps=0, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8,
    weight_decay=0.1, max_grad_norm=1.0, optim="adamw_torch", bf16=False, gradient_checkpointing=False, use_cpu=True,
    save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True, train_sampling_strategy="sequential",
    dataloader_pin_memory=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory, compile_cache) -> Path:
    """A Llama with random weights as a run, and beside it as a folder of transformers."""
    folder = tmp_path_factory.mktemp("trl")
    config = TrainConfig(
        run_dir=str(folder / "base"), model=LLAMA, tokenizer=TokenizerConfig(kind="bytes", vocab_size=258),
        data=DataConfig(length=LENGTH),
    )  # fmt: skip
    run = Run.open(folder / "base", config)
    BytesTokenizer().save(run.tokenizer)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
    params = jax.jit(init_params(make_decoder(config)))(jax.random.key(0))
    checkpoints.save(0, {"params": params}, {"rows": 0}, dict(leaves(config)))
    checkpoints.wait()
    run.close()
    export(load(folder / "base"), folder / "theirs")
    return folder / "base"


def ours(verb: str, base: Path, source: Path, *more: str) -> tuple[Path, list[float]]:
    """The folder of a run of a verb, and its losses."""
    folder = source.with_suffix("")
    words = ["--init", base, "--data.source", source, "--run-dir", folder, *SETTINGS, *more]
    assert main([verb, "chat", *map(str, words)]) == 0
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return folder, [line["loss"] for line in lines if "loss" in line]


def losses_of(trainer_class: Any, config_class: Any, base: Path, rows: list[dict], **settings: Any) -> list[float]:
    """The losses of TRL's trainer on rows of ids in their order."""
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    losses: list[float] = []

    class Trainer(trainer_class):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # these are ids already

        def compute_loss(self, *args, **kwargs):
            result = super().compute_loss(*args, **kwargs)
            losses.append(float((result[0] if isinstance(result, tuple) else result).detach()))
            return result

    folder = base.with_name("theirs")
    trainer = Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder, pad_token="</s>"),
        args=config_class(output_dir=str(base.with_name("out")), max_length=LENGTH + 1, **THEIRS, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    trainer.train()
    return losses


def test_twenty_losses_of_fine_tuning_are_those_of_trl(base, highest_precision):
    trl = pytest.importorskip("trl")
    rng, source = random.Random(0), base.with_name("chats.jsonl")
    chats = []
    for _ in range(STEPS * ROWS + 20):  # of more than half of a row, so that each has one of its own
        question, answer = ("".join(rng.choices("abcdef ", k=rng.randint(25, 30))) for _ in range(2))
        chats.append({"prompt": question, "completion": answer[: rng.randint(18, 30)]})
    source.write_text("\n".join(map(json.dumps, chats)))
    run, losses = ours("sft", base, source)
    config = load_config(run)
    assert isinstance(config, SftConfig)
    data = ChatData(config, run / "data", training=False)
    batch = data.batch(0)
    assert data.train.num_rows >= STEPS * ROWS and batch["segments_BL"].max() == 1
    rows = []
    for step in range(STEPS):
        batch = data.batch(step * ROWS)
        for inputs, targets, weights, segments in zip(
            *(batch[f"{n}_BL"] for n in ("inputs", "targets", "weights", "segments"))
        ):
            size = int(segments.sum())
            labels = np.where(weights[:size] > 0, targets[:size], -100).tolist()
            rows.append({"input_ids": [*inputs[:size].tolist(), int(targets[size - 1])], "labels": [-100, *labels]})
    theirs = losses_of(trl.SFTTrainer, trl.SFTConfig, base, rows)
    assert losses[-1] < losses[0] - 0.5 and len(theirs) == STEPS
    np.testing.assert_allclose(losses, theirs, rtol=0, atol=1e-4)


def test_twenty_losses_of_dpo_are_those_of_trl(base, highest_precision):
    trl = pytest.importorskip("trl")
    rng, source = random.Random(1), base.with_name("pairs.jsonl")
    pairs = []
    for _ in range(STEPS * ROWS + 20):
        question, chosen, rejected = ("".join(rng.choices("abcdef ", k=rng.randint(5, 25))) for _ in range(3))
        pairs.append({"prompt": question, "chosen": chosen + "!", "rejected": rejected + "?"})
    source.write_text("\n".join(map(json.dumps, pairs)))
    run, losses = ours("dpo", base, source)
    config = load_config(run)
    assert isinstance(config, DpoConfig)
    data = PreferenceData(config, run / "data", training=False, trees=False)
    assert data.train.num_rows >= STEPS * ROWS
    rows = []
    for number in shuffled(0, STEPS * ROWS, data.train.num_rows, config.seed):
        (chosen, weights), (rejected, _) = data.train.prompts[number].answers
        asked = weights.index(1)
        ids = {"prompt_ids": chosen[:asked], "chosen_ids": chosen[asked:], "rejected_ids": rejected[asked:]}
        rows.append({name: list(x) for name, x in ids.items()})
    theirs = losses_of(trl.DPOTrainer, trl.DPOConfig, base, rows, beta=0.1, loss_type=["sigmoid"])
    assert losses[-1] < losses[0] - 0.05 and len(theirs) == STEPS
    np.testing.assert_allclose(losses, theirs, rtol=0, atol=1e-4)
