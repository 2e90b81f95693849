"""A competitor of throughput.py in torch: GPT-2 or Llama of Hugging Face's transformers, trained as its users do.

A child of worker_pool.py that imports nothing of ours, so that it may run in another Python. The optimizer is AdamW,
fused; bfloat16 is torch's autocast; compiled means torch.compile of the model and its loss; attention is torch's scaled
dot product. Initial weights, batches, the groups without decay and the clipping are those of our step.
"""

import contextlib
import os
import resource
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from worker_pool import serve

UNDECAYED = ("norm", "bias", "ln_", "wpe")


class TorchCompetitor:
    def __init__(self, setting: dict[str, Any]):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        torch.set_num_threads(setting["threads"])
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as jax multiplies float32 there by default
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batches = [
            {name: torch.from_numpy(stored).long() for name, stored in batch.items()}
            for batch in read_batches(setting["batches"])
        ]
        model = make_model(setting["family"], setting["config"])
        weights = {name: torch.from_numpy(x) for name, x in np.load(setting["weights"]).items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        model.tie_weights()
        self.model = model.to(self.device).train()
        self.dtype, self.clip_norm = setting["dtype"], setting["config"]["optim.clip_norm"]
        self.optimizer = make_optimizer(self.model, setting["config"])
        self.loss = torch.compile(self._loss) if setting["compile"] else self._loss
        self.done = 0
        self.facts = {
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "platform": self.device.type,
            "threads": torch.get_num_threads(),
        }

    def _loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model(inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def run(self, steps: int) -> list[dict[str, float]]:
        """So many training steps; the loss and the norm of the gradient of each, read at the end."""
        rows = []
        for i in range(self.done, self.done + steps):
            batch = self.batches[i % len(self.batches)]
            inputs, targets = (batch[name].to(self.device, non_blocking=True) for name in ("inputs_BL", "targets_BL"))
            autocast = torch.autocast(self.device.type, torch.bfloat16)
            with autocast if self.dtype == "bfloat16" else contextlib.nullcontext():
                loss = self.loss(inputs, targets)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            rows.append((loss.detach(), norm))
        self._wait()
        self.done += steps
        return [{"loss": float(loss), "grad_norm": float(norm)} for loss, norm in rows]

    def products(self, shapes: list[tuple[int, int, int]], dtype: str, seconds: float) -> list[float]:
        """GFLOP/s of [m, k] @ [k, n] for each shape, both operands in plain row-major order."""
        rates = []
        for m, k, n in shapes:
            a, b = (torch.ones(shape, dtype=getattr(torch, dtype), device=self.device) for shape in ((m, k), (k, n)))
            times = []
            for count in (1, 1, 0):
                count = count or max(1, min(50, int(seconds / times[-1])))
                start = time.perf_counter()
                for _ in range(count):
                    torch.mm(a, b)
                self._wait()
                times.append((time.perf_counter() - start) / count)
            rates.append(2e-9 * m * k * n / times[-1])
        return rates

    def memory(self) -> dict[str, int]:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        on_gpu = self.device.type == "cuda"
        return {"resident_bytes": resident, "device_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def read_batches(path: str) -> list[dict[str, np.ndarray]]:
    stored = np.load(path)
    return [
        {name: np.ascontiguousarray(stored[name][i]) for name in ("inputs_BL", "targets_BL")}
        for i in range(int(stored["count"]))
    ]


def make_model(family: str, config: dict[str, Any]) -> Any:
    """The model of transformers that computes what ours does at these settings; no dropout."""
    model = {name.removeprefix("model."): value for name, value in config.items() if name.startswith("model.")}
    shared: dict[str, Any] = {
        "vocab_size": config["tokenizer.vocab_size"], "tie_word_embeddings": model["tied"],
        "attn_implementation": "sdpa", "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    width, mlp_width = model["width"], round(model["width"] * model["mlp_ratio"])
    if family == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_layer=model["num_layers"], n_head=model["num_heads"], n_embd=width, n_inner=mlp_width,
            n_positions=config["data.length"], layer_norm_epsilon=model["norm_epsilon"],
            activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared,
        ))  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        num_hidden_layers=model["num_layers"], num_attention_heads=model["num_heads"], hidden_size=width,
        num_key_value_heads=model["num_heads"] // model["queries_per_kv"], intermediate_size=mlp_width,
        max_position_embeddings=config["data.length"], rms_norm_eps=model["norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": model["rope_theta"]}, **shared,
    ))  # fmt: skip


def make_optimizer(model: Any, config: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW with our settings; norms, biases and the position table do not decay."""
    named = list(model.named_parameters())
    plain = [p for name, p in named if any(word in name for word in UNDECAYED)]
    decayed = [p for name, p in named if not any(word in name for word in UNDECAYED)]
    groups = [
        {"params": decayed, "weight_decay": config["optim.weight_decay"]},
        {"params": plain, "weight_decay": 0.0},
    ]
    betas = config["optim.beta1"], config["optim.beta2"]
    return torch.optim.AdamW(groups, config["optim.learning_rate"], betas, config["optim.epsilon"], fused=True)


if __name__ == "__main__":
    serve(TorchCompetitor, ("run", "products", "memory"))
