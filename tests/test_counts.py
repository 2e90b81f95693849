"""Counts agree with published models and with their own formulas."""

import pytest

from gptjax.config import ModelConfig
from gptjax.model.counts import flops_per_token, padded_vocab, parameters

GPT2 = ModelConfig(num_layers=12, width=768, num_heads=12)
LLAMA = ModelConfig(queries_per_kv=4, positions="rope", norm="rmsnorm", activation="swiglu", biases=False)


@pytest.mark.parametrize("cfg", [GPT2, LLAMA, ModelConfig(tied=False, biases=True, activation="swiglu")])
def test_the_parts_add_up(cfg):
    count = parameters(cfg, 1000, 128)
    parts = ("embed", "positions", "attention", "mlp", "norms", "head")
    assert sum(count[p] for p in parts) == count["total"] == count["embedding"] + count["non_embedding"]


def test_an_untied_head_costs_one_vocabulary_of_rows():
    tied, untied = ModelConfig(tied=True), ModelConfig(tied=False)
    a, b = parameters(tied, 1000, 128), parameters(untied, 1000, 128)
    assert b["total"] - a["total"] == 1000 * 768
    assert a["matrices"] == b["matrices"]
    assert (padded_vocab(1000), padded_vocab(1024), padded_vocab(1025)) == (1024, 1024, 1088)


def test_mfu_of_a_known_run_comes_out_as_published():
    """llm.c on one H100: 468k tokens/s of GPT-2 124M at length 1024; 35.3 % by 6N, 38.0 % causal, 40.7 % PaLM."""
    flops = flops_per_token(GPT2, 50_304, 1024)
    mfu = {name: 100 * value * 468e3 / 989e12 for name, value in flops.items()}
    # They count the position table as a matrix; we do not.
    assert mfu["6n"] == pytest.approx(35.3, abs=0.3)
    assert mfu["causal"] == pytest.approx(38.0, abs=0.3)
    assert mfu["palm"] == pytest.approx(40.7, abs=0.3)
