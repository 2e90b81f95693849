"""A fine-tuned run against the run it began from, on the conversations that were held out: paired, answer by answer.

    gptjax import SmolLM2-135M-Instruct.Q4_1.gguf runs/smollm2
    gptjax sft chat --init runs/smollm2 --data.source FOLDER --run-dir runs/chat --lora.rank 16 ...
    python benchmarks/sft_gain.py runs/chat --out DIR

The loss is that of the assistant's tokens, in nats a token. Its fall has a standard error by conversations: with d_i
the fall of conversation i in nats and n_i its tokens, the ratio D = sum d / sum n has the variance
sum (d_i - D n_i)^2 / (sum n)^2 x m / (m - 1), m the conversations. No question of the held-out ones was trained on (a
hash of it decides).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import facts, write_report

from gptjax.config import SftConfig
from gptjax.data.chats import ChatData
from gptjax.model.decoder import head
from gptjax.parallel.sharding import on_host
from gptjax.runs.load import LoadedModel, load_model
from gptjax.runtime.process import tune_process
from gptjax.training.losses import token_log_probs


def losses(model: LoadedModel, rows: Any, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(nats of the answers, their tokens) of each conversation, in the order of the rows."""
    decoder, nats, tokens = model.decoder, [], []

    @jax.jit
    def log_p(params, batch):
        inputs = (batch["inputs_BL"], batch["positions_BL"], batch["segments_BL"])
        x_BLD, _ = decoder.apply({"params": params}, *inputs)
        softcap = decoder.cfg.logit_softcap
        return token_log_probs(x_BLD, head(params), batch["targets_BL"], decoder.vocab_size, softcap)[0]

    with jax.set_mesh(model.mesh):
        for batch in rows.in_order(batch_size):
            arrays = {name: jnp.asarray(x) for name, x in batch.items()}
            loss_BL, weights_BL = -np.asarray(on_host([log_p(model.params, arrays)])[0]), batch["weights_BL"]
            for row, segments in enumerate(batch["segments_BL"]):
                for segment in np.unique(segments[weights_BL[row] > 0]):
                    here = weights_BL[row] * (segments == segment)
                    nats.append(float((loss_BL[row] * here).sum()))
                    tokens.append(float(here.sum()))
    return np.array(nats), np.array(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="by gptjax sft")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tune_process()
    tuned = load_model(args.run, None)
    config = tuned.config
    assert isinstance(config, SftConfig), f"{args.run} is no run of gptjax sft"
    rows = ChatData(config, tuned.run.data, training=False).held.rows
    after, count = losses(tuned, rows, config.data.batch_size)
    before, _ = losses(load_model(config.init, None), rows, config.data.batch_size)
    fall = before - after
    mean = fall.sum() / count.sum()
    error = np.sqrt(((fall - mean * count) ** 2).sum() * len(fall) / (len(fall) - 1)) / count.sum()
    lines = [json.loads(line) for line in tuned.run.metrics_path.read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    result = {
        "conversations": len(fall),
        "tokens": int(count.sum()),
        "before": float(before.sum() / count.sum()),
        "after": float(after.sum() / count.sum()),
        "fall": float(mean),
        "standard_error": float(error),
        "better": float((fall > 0).mean()),
        "steps": tuned.step,
        "train_tokens": steps[-1]["tokens"],
        "settings": tuned.run.config_path.read_text() and json.loads(tuned.run.config_path.read_text())["settings"],
    }
    kind = f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s)"
    path = write_report(facts(kind, "jax", "gptjax") | result, args.out, "sft_gain")
    share = mean / result["before"]
    print(
        f"{len(fall)} conversations held out, {count.sum():,.0f} tokens of answers: {result['before']:.4f} before, "
        f"{result['after']:.4f} after: {share:.1%} lower, {mean / error:.1f} standard errors; "
        f"{result['better']:.0%} of the conversations are better"
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
