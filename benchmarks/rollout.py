"""Rollouts: tokens a second of answers with their log-probabilities, beside the decode loop that draws none.

    python benchmarks/rollout.py --out DIR                       # 13.9M: 6 layers of 384, 8,192 ids, float32
    python benchmarks/rollout.py --shape smollm2 --out DIR       # SmolLM2-135M's shape

Each round runs, one after the other and with the same weights and prompts: prefill and loop of benchmarks/decode.py
(greedy, no log-probabilities) on every row; the same with what a rollout adds (drawn at temperature 1, log p kept); and
a whole rollout (`align.rollout.Sampler.draw`: weights laid out, each prompt read once for all of its answers, all of it
copied to the host as rows). So a ratio compares neighbours in time: `loop_ratio` the two loops, whose floor is 0.8, and
`end_to_end_ratio` the rollout with decode.py's prefill and loop. Writes DATE_rollout.json.
"""

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from decode import NEVER
from report import facts, spread, write_report

from gptjax.align.rollout import Sampler
from gptjax.config import ModelConfig, RolloutConfig
from gptjax.data.prompts import Prompt
from gptjax.generation.engine import decode, decode_params, prefill
from gptjax.model.cache import round_up_length
from gptjax.model.decoder import Decoder, init_params
from gptjax.runtime.process import tune_process
from gptjax.tokenizer import BytesTokenizer

LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "biases": False, "dtype": "float32"}
SHAPES = {
    "13.9m": (ModelConfig(num_layers=6, width=384, num_heads=6, dtype="float32"), 8192),
    "smollm2": (ModelConfig(num_layers=30, width=576, num_heads=9, queries_per_kv=3, **LLAMA), 49_152),
}


class Ids(BytesTokenizer):
    """A tokenizer of any number of ids, of which none ends an answer."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size, self.eos_id = vocab_size, -1

    def decode_bytes(self, ids: Any) -> bytes:
        return bytes(i % 256 for i in ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="13.9m")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="folder for the dated report")
    args = parser.parse_args()
    cfg, vocab_size = SHAPES[args.shape]
    decoder = Decoder(cfg, vocab_size, 256)
    params = jax.block_until_ready(jax.jit(init_params(decoder))(jax.random.key(0)))
    rows, rng = args.prompts * args.answers, np.random.default_rng(0)
    prompt_PL = rng.integers(0, vocab_size, (args.prompts, args.prompt)).astype(np.int32)
    prompts = [Prompt(ids.tolist(), {"prompt": ""}, "") for ids in prompt_PL]
    rollout = RolloutConfig(answers=args.answers, max_new_tokens=args.new)
    sampler = Sampler(decoder, Ids(vocab_size), rollout, length=256, longest=args.prompt, seed=0)
    weights = jax.block_until_ready(decode_params(params, cfg.dtype))
    length_B = np.full(rows, args.prompt, np.int32)
    width, slots = (round_up_length(n, decoder.context) for n in (args.prompt, args.prompt + args.new))
    prompt_BL = np.repeat(np.pad(prompt_PL, ((0, 0), (0, width - args.prompt))), args.answers, axis=0)
    constant = {"copy_B": np.zeros(rows, np.int32), "last_B": length_B + args.new - 1}
    rest = (np.uint32(0), NEVER, np.zeros(rows, bool), np.int32(args.new))

    def loop(log_p: bool) -> tuple[float, float]:
        settings = {"temperature": 1.0} if log_p else {}
        start = time.perf_counter()
        state = jax.block_until_ready(prefill(decoder, weights, prompt_BL, length_B, slots, False, log_p))
        middle = time.perf_counter()
        jax.block_until_ready(decode(decoder, weights, state, constant, settings, *rest))
        return middle - start, time.perf_counter() - middle

    def draw(step: int) -> float:
        start = time.perf_counter()
        drawn = sampler.draw(params, prompts, first=0, step=step)
        seconds = time.perf_counter() - start
        assert drawn.batch["mask_BL"].sum() == rows * args.new, "every answer has all its tokens"
        return seconds

    _ = loop(False), loop(True), draw(0)  # compiles
    rounds = []
    for step in range(args.rounds):
        (prefill_s, decode_s), (_, with_s), rollout_s = loop(False), loop(True), draw(step)
        tokens = rows * args.new
        rounds.append({
            "decode_tokens_per_second": tokens / decode_s, "with_log_p_tokens_per_second": tokens / with_s,
            "rollout_tokens_per_second": tokens / rollout_s, "loop_ratio": decode_s / with_s,
            "end_to_end_ratio": (prefill_s + decode_s) / rollout_s,
        })  # fmt: skip
    device = f"{platform.machine()} {jax.devices()[0].device_kind}"
    report = facts(device, "jax", "flax", "numpy") | {"setting": vars(args) | {"out": str(args.out)}, "rounds": rounds}
    report |= {name: spread([r[name] for r in rounds]) for name in rounds[0]}
    for name in rounds[0]:
        print(f"{name:28s} {report[name]['median']:10.3f}   ({report[name]['p5']:.3f} to {report[name]['p95']:.3f})")
    print(f"wrote {write_report(report, args.out, 'rollout')}")


if __name__ == "__main__":
    tune_process()
    main()
