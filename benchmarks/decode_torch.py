"""The competitor of decode.py in torch: `generate` of transformers' GPT-2 on the CPU, in float32, as its users call it.

A child of worker_pool.py that imports nothing of ours and sets nothing but the number of threads.
"""

import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from worker_pool import serve


class TorchDecoder:
    """GPT-2 of random weights, which it saves in the setting's `folder`; prompts are read from the same folder."""

    def __init__(self, setting: dict[str, Any]):
        torch.set_num_threads(setting["threads"])
        torch.manual_seed(0)
        self.folder = setting["folder"]
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**setting["config"])).eval()
        self.model.save_pretrained(self.folder)
        self.numbers = torch.ones(1)
        self.facts = {"versions": {name: version(name) for name in ("torch", "transformers")}}

    def generate(self, rows: int, new: int) -> dict[str, Any]:
        """The new ids of prompts_ROWS.npy, the seconds until the first of them is there, and those of the rest."""
        times: list[float] = []

        def note(ids, scores, **_):
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        prompt_BL = np.load(f"{self.folder}/prompts_{rows}.npy")
        ids_BL = torch.from_numpy(prompt_BL.astype(np.int64))
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids_BL, attention_mask=torch.ones_like(ids_BL), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, use_cache=True, pad_token_id=0, stopping_criteria=[note],
            )  # fmt: skip
        ids = out[:, prompt_BL.shape[1] :].tolist()
        return {"ids": ids, "first_s": times[0] - start, "rest_s": times[-1] - times[0]}

    def read(self, size: int) -> float:
        """Bytes a second of adding up an array of `size` bytes."""
        if self.numbers.nbytes != size // 4 * 4:
            self.numbers = torch.ones(size // 4)
            self.numbers.sum()
        start = time.perf_counter()
        for _ in range(3):
            self.numbers.sum()
        return 3 * self.numbers.nbytes / (time.perf_counter() - start)


if __name__ == "__main__":
    serve(TorchDecoder, ("generate", "read"))
