"""The baseline for a small model trained on Shakespeare by character: nanoGPT's recipe, written anew in plain PyTorch.

    pip install torch numpy
    python benchmarks/shakespeare_char_torch.py --seeds 1 2 3 --out benchmarks/results/shakespeare_char_torch.json

The recipe is nanoGPT's CPU setting of train_shakespeare_char (github.com/karpathy/nanoGPT, README.md): a GPT-2 of 4
layers, 4 heads and width 128, without biases or dropout, on 12 random windows of 64 characters a step for 2,000 steps
of AdamW, in float32 and eager. The vocabulary is the distinct bytes of the text, not all 256: as in nanoGPT, and the
stronger baseline. The last tenth of the text is held out.

Reports, for each seed, the loss in nats a byte over the whole held-out split (windows of 64 that do not overlap, each
byte but the first predicted once), tokens a second from the median step, and wall time; then the mean loss, versions
and command. Nothing of gptjax is imported, so that it runs in an environment that holds only torch.
"""

import argparse
import hashlib
import json
import math
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from report import ROOT, facts
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

NUM_LAYERS, NUM_HEADS, WIDTH, LENGTH, BATCH_SIZE = 4, 4, 128, 64, 12
LEARNING_RATE, FINAL_LEARNING_RATE, WARMUP_STEPS = 1e-3, 1e-4, 100
WEIGHT_DECAY, BETAS, CLIP_NORM = 0.1, (0.9, 0.99), 1.0
HELD_OUT = 0.1
UNTIMED_STEPS = 20  # the first steps fill caches and memory pools
THREADS = 2
TEXT = ROOT / "gptjax" / "data" / "corpora" / "shakespeare.txt"


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self):
        super().__init__()
        self.norm_attention = nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm_mlp = nn.LayerNorm(WIDTH, bias=False)
        self.mlp_in = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.mlp_out = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x_BLD):
        batch, length, _ = x_BLD.shape
        heads = self.qkv(self.norm_attention(x_BLD)).view(batch, length, 3, NUM_HEADS, WIDTH // NUM_HEADS)
        q_BHLK, k_BHLK, v_BHLK = heads.permute(2, 0, 3, 1, 4)
        mixed_BHLK = functional.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=True)
        x_BLD = x_BLD + self.attention_out(mixed_BHLK.transpose(1, 2).reshape(x_BLD.shape))
        return x_BLD + self.mlp_out(functional.gelu(self.mlp_in(self.norm_mlp(x_BLD))))


class Decoder(nn.Module):
    """GPT-2 with learned positions and a head tied to the embedding."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(NUM_LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() >= 2:
                rejoins = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * NUM_LAYERS) if rejoins else 0.02)

    def forward(self, inputs_BL):
        x_BLD = self.embedding(inputs_BL) + self.positions.weight[: inputs_BL.shape[1]]
        return functional.linear(self.norm(self.blocks(x_BLD)), self.embedding.weight)


def loss_of(model, inputs_BL, targets_BL, reduction="mean"):
    """Cross-entropy in nats of the targets under the model, over all positions of all rows."""
    return functional.cross_entropy(model(inputs_BL).flatten(0, 1), targets_BL.flatten(), reduction=reduction)


def learning_rate(step: int, steps: int) -> float:
    """Straight up for WARMUP_STEPS, then half a cosine down to FINAL_LEARNING_RATE when all steps are done."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / (WARMUP_STEPS + 1)
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_LEARNING_RATE + 0.5 * (1 + math.cos(math.pi * done)) * (LEARNING_RATE - FINAL_LEARNING_RATE)


def train(ids, vocab_size: int, seed: int, steps: int):
    """Trains a model on random windows of ids; returns it and the seconds that each step took."""
    torch.manual_seed(seed)
    model = Decoder(vocab_size)
    matrices = [w for w in model.parameters() if w.dim() >= 2]
    vectors = [w for w in model.parameters() if w.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        starts_B = torch.randint(len(ids) - LENGTH, (BATCH_SIZE,))
        rows = ids[starts_B[:, None] + torch.arange(LENGTH + 1)]
        loss = loss_of(model, rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return model, seconds


@torch.no_grad()
def evaluate(model, ids) -> float:
    """Mean loss over all of ids but the first, in windows of LENGTH that do not overlap; the last may be shorter."""
    inputs, targets = ids[:-1], ids[1:]
    whole = len(inputs) // LENGTH * LENGTH
    rows = zip(inputs[:whole].view(-1, LENGTH).split(256), targets[:whole].view(-1, LENGTH).split(256))
    total = sum(loss_of(model, i_BL, t_BL, "sum").item() for i_BL, t_BL in rows)
    if whole < len(inputs):
        total += loss_of(model, inputs[None, whole:], targets[None, whole:], "sum").item()
    return total / len(inputs)


def run(ids, vocab_size: int, seed: int, steps: int) -> dict:
    """Trains and evaluates with one seed; returns the loss, tokens a second and seconds."""
    start = time.perf_counter()
    held_out = int(len(ids) * HELD_OUT)
    model, seconds = train(ids[:-held_out], vocab_size, seed, steps)
    speed = BATCH_SIZE * LENGTH / statistics.median(seconds[UNTIMED_STEPS:])
    loss = evaluate(model, ids[-held_out:])
    print(
        f"seed {seed}: {loss:.4f} nats a byte, {speed:,.0f} tokens/s, {time.perf_counter() - start:.0f} s", flush=True
    )
    return {"seed": seed, "loss": loss, "tokens_per_second": speed, "seconds": time.perf_counter() - start}


def setting(text: bytes, steps: int) -> dict:
    """What must stand beside the numbers: the machine, versions, commit and command, and the text."""
    device = f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {THREADS} threads"
    return facts(device, "torch", "numpy") | {
        "source_sha256": hashlib.sha256(text).hexdigest(),
        "source_bytes": len(text),
        "held_out_bytes": int(len(text) * HELD_OUT),
        "vocabulary": len(set(text)),
        "parameters": sum(w.numel() for w in Decoder(len(set(text))).parameters()),
        "steps": steps,
    }


def main():
    # Without the usage, a bad option is answered with one line.
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=TEXT, help="text to learn (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="one training run each (default: 1 2 3)"
    )
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: none)")
    args = parser.parse_args()
    if args.steps <= UNTIMED_STEPS:
        parser.error(f"--steps {args.steps}: wanted more than the {UNTIMED_STEPS} steps left untimed")
    if not args.source.is_file():
        parser.error(f"--source {args.source}: no such file; give --source FILE")
    text = args.source.read_bytes()
    if len(text) * HELD_OUT <= LENGTH:
        parser.error(f"--source {args.source}: {len(text)} bytes, wanted more than {LENGTH / HELD_OUT:g}")

    torch.set_num_threads(THREADS)
    report = setting(text, args.steps)
    print(json.dumps(report, indent=2), flush=True)
    ids = torch.from_numpy(np.unique(np.frombuffer(text, np.uint8), return_inverse=True)[1])
    report["runs"] = [run(ids, report["vocabulary"], seed, args.steps) for seed in args.seeds]
    report["mean_loss"] = statistics.mean(r["loss"] for r in report["runs"])
    print(f"mean of {len(args.seeds)} seed(s): {report['mean_loss']:.4f} nats a byte")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
