"""A run of bytes with its first weights, whose template is llama2: what a conversation needs."""

from pathlib import Path

import jax

from gptjax.config import DataConfig, ModelConfig, TokenizerConfig, TrainConfig
from gptjax.config.section import leaves
from gptjax.model.decoder import init_params, make_decoder
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run
from gptjax.tokenizer import BytesTokenizer, set_template


def byte_run(folder: Path, model: ModelConfig, context: int) -> Path:
    """Makes the run in a folder, which is returned."""
    tokenizer = TokenizerConfig(kind="bytes", vocab_size=258, template="llama2")
    config = TrainConfig(run_dir=str(folder), model=model, tokenizer=tokenizer, data=DataConfig(length=context))
    opened, ours = Run.open(folder, config), BytesTokenizer()
    set_template(ours, "llama2")
    ours.save(opened.tokenizer)
    checkpoints = Checkpoints(opened.checkpoints, config.checkpoint)
    params = jax.jit(init_params(make_decoder(config)))(jax.random.key(0))
    checkpoints.save(0, {"params": params}, {"rows": 0}, dict(leaves(config)))
    checkpoints.wait()
    opened.close()
    return folder
