"""Limits of training speed outside of the model: the rate of its input."""

import tempfile
from pathlib import Path

import jax

from gptjax.config import DataConfig, PrepareConfig, TokenizerConfig
from gptjax.data.prepare import prepare
from gptjax.data.rate import rows_rate
from gptjax.diagnostics.doctor.finding import Finding

# The rate that one accelerator may need: a 124M model at length 2,048 takes 549,000 tokens/s on an H100 (nanochat's
# figure, not measured here). A CPU needs at most a tenth of that.
MOST_TOKENS_A_SECOND, CPU_TOKENS_A_SECOND = 5.5e5, 5e4
SECONDS = 1.0


def input_ceiling() -> Finding:
    """Tokens a second of the built-in corpus, prepared, as rows of 1,024 with no model behind them."""
    data = DataConfig(batch_size=8, length=1024)
    tokenizer = TokenizerConfig(kind="bytes", vocab_size=TokenizerConfig.BYTES_VOCAB)
    with tempfile.TemporaryDirectory(prefix="gptjax-doctor-") as folder:
        prepare(PrepareConfig(source=data.source, out=folder, tokenizer=tokenizer, workers=1))
        rate = rows_rate(Path(folder), data, SECONDS)
    local = jax.local_devices()
    needed = CPU_TOKENS_A_SECOND if local[0].platform == "cpu" else MOST_TOKENS_A_SECOND * len(local)
    text, numbers = f"{rate:,.0f} tokens/s of prepared text, with no model behind it", {"tokens_per_second": rate}
    if rate < needed:
        advice = "set --data.workers, or small models on these devices will wait for their batches"
        return Finding("input", "warning", f"{text}, less than {needed:,.0f}", advice, numbers)
    return Finding("input", "ok", text, data=numbers)
