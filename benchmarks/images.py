"""Training on rows with pictures against rows of text of the same length: tokens a second, every place counted.

    python benchmarks/images.py --rounds 15 --out benchmarks/results

The decoder, and the encoder of the pictures, are those of a recipe (configs/vqa.py). A row with pictures is made as
`gptjax sft` makes it: several questions behind one copy of each picture. A row of text is as long, of documents as long
as the questions with their picture; it goes through the same decoder without an encoder. In each round both train some
steps, in turn, and the ratio is that of the round. The seconds that making a batch takes are beside it: training makes
the next one while the device works. Prints the losses before and after, which fall where the steps train.
"""

import argparse
import dataclasses
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from report import facts, processor, spread, write_report

from gptjax.config import MeshConfig, TrainConfig, VisionConfig
from gptjax.config.command_line import load_recipe
from gptjax.data.dialogue import ConversationRows
from gptjax.data.image_rows import ImageConversation, ImageRows, place_images
from gptjax.data.images import Picture
from gptjax.data.packing import Batch
from gptjax.data.pictures import PictureFile
from gptjax.model.counts import token_flops
from gptjax.parallel.sharding import abstract, make_mesh
from gptjax.runtime.dtype import preferred_dtype
from gptjax.runtime.process import tune_process
from gptjax.training.build import build_components
from gptjax.training.step import compile_step, init_state

QUESTION, ANSWER = 10, 2  # tokens


def conversations(config: TrainConfig, pictures: PictureFile, count: int, each: int) -> list[ImageConversation]:
    """`each` questions about each of `count` pictures of noise, whose answers say how bright it is."""
    rng, vision = np.random.default_rng(0), config.model.vision
    made = []
    for number in range(count):
        level = int(rng.integers(1, 200))
        file = io.BytesIO()
        Image.fromarray(rng.integers(level, level + 56, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
        picture = Picture.of(file.getvalue(), f"picture {number}")
        pictures.add(picture)
        for _ in range(each):
            ids = [1, -1, *rng.integers(20, 300, QUESTION), 3 + level // 25, 2]
            weights = [0] * (2 + QUESTION) + [1] * ANSWER
            made.append(ImageConversation(*place_images(ids, weights, [picture.key], vision), [picture.key], ""))
    return made


def texts(size: int, vocab_size: int) -> list[tuple[list[int], list[int]]]:
    """Documents of so many tokens to predict: ids that rise by 1 from another one each time."""
    starts = np.random.default_rng(1).integers(3, vocab_size - 64, 4_096)
    return [((start + np.arange(size + 1) % 64).tolist(), [1] * (size + 1)) for start in starts]


class Contender:
    """A model under training, on batches that a function makes."""

    def __init__(self, config: TrainConfig, batches: Callable[[int], Batch]):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        self._mesh, self._batches, self._number = mesh, batches, 0
        parts = build_components(config)
        self.input_seconds: list[float] = []
        with jax.set_mesh(mesh):
            state = abstract(jax.eval_shape(parts.init, 0), mesh)
            example = abstract(batches(0), mesh)
            shapes = state, {}, example
            self._step = compile_step(parts.step, mesh, *shapes).lower(*shapes).compile()
            self._state = init_state(parts.init, 0, mesh)
        self.losses: list[float] = []

    def seconds(self, steps: int) -> float:
        """Seconds of so many steps, whose batches lie ready."""
        start = time.perf_counter()
        ready = [self._batches(self._number + i) for i in range(steps)]
        self.input_seconds.append((time.perf_counter() - start) / steps)
        self._number += steps
        with jax.set_mesh(self._mesh):
            ready = jax.block_until_ready(jax.device_put(ready))
            start = time.perf_counter()
            for batch in ready:
                self._state, metrics = self._step(self._state, {}, batch)
            jax.block_until_ready(self._state)
            taken = time.perf_counter() - start
        self.losses.append(float(metrics["loss"]))
        return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="vqa", help="a recipe of sft with a model that reads images")
    parser.add_argument("--rows", type=int, default=0, help="rows of a batch; 0: the recipe's")
    parser.add_argument("--length", type=int, default=0, help="places of a row; 0: the recipe's")
    parser.add_argument("--questions", type=int, default=9, help="about each picture")
    parser.add_argument("--steps", type=int, default=10, help="of each in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--least", type=float, default=0.0, help="fail (exit 1) where the median ratio is less")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    args = parser.parse_args()

    sft: Any = load_recipe(args.recipe).config("sft")
    whole = TrainConfig(**{f.name: getattr(sft, f.name) for f in dataclasses.fields(TrainConfig)})
    data = dataclasses.replace(
        whole.data, batch_size=args.rows or whole.data.batch_size, length=args.length or whole.data.length
    )
    config = dataclasses.replace(whole, data=data, init="", steps=(args.rounds + 1) * args.steps)
    if config.model.dtype == "auto":
        config = config.with_dtype(preferred_dtype()[0])
    rows, length, vocab_size = data.batch_size, data.length, config.tokenizer.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        pictures = PictureFile(config.model.vision, Path(folder))
        made = conversations(config, pictures, 400, args.questions)
        of_images = ImageRows(made, length, pictures)
        size = config.model.vision.tokens_around + args.questions * (QUESTION + ANSWER) + 1
        of_text = ConversationRows(texts(size, vocab_size), length)
        blind = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=VisionConfig()))
        contenders = {
            "text": Contender(blind, lambda number: of_text.batch(number * rows, rows)),
            "images": Contender(config, lambda number: of_images.batch(number * rows, rows)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for contender in contenders.values():  # warm-up
            contender.seconds(args.steps)
            del contender.input_seconds[:]
        for turn in range(args.rounds):
            for name in list(contenders)[:: 1 if turn % 2 else -1]:
                seconds[name].append(contenders[name].seconds(args.steps))
    ratios = [text / images for text, images in zip(seconds["text"], seconds["images"], strict=True)]
    tokens = args.steps * rows * length
    results: dict[str, Any] = {
        name: {
            "tokens_per_second": tokens / statistics.median(seconds[name]),
            "input_seconds_a_batch": statistics.median(contender.input_seconds),
            "losses": [contender.losses[0], contender.losses[-1]],
        }
        for name, contender in contenders.items()
    }
    flops = token_flops(config, of_images.mean_images) / token_flops(blind)
    results |= {"ratio": spread(ratios), "ratios": ratios, "flops_of_a_token": flops}
    setting = {
        "recipe": args.recipe, "rows": rows, "length": length, "dtype": config.model.dtype, "steps": args.steps,
        "images_a_row": of_images.mean_images, "most_images_a_row": of_images.num_images,
        "image_tokens": config.model.vision.num_tokens, "rounds": args.rounds,
    }  # fmt: skip
    for name in contenders:
        x = results[name]
        print(
            f"{name:7s} {x['tokens_per_second']:9,.0f} tokens/s  loss {x['losses'][0]:.3f} to {x['losses'][1]:.3f}  "
            f"making a batch {1000 * x['input_seconds_a_batch']:.1f} ms"
        )
    middle = results["ratio"]
    print(
        f"with images {middle['median']:.2f} times the tokens/s of text ({middle['p5']:.2f} to {middle['p95']:.2f}); a "
        f"token has {flops:.2f} times the FLOPs; {of_images.mean_images:.2f} images a row"
    )
    print(write_report(facts(processor(), "jax", "jaxlib", "pillow") | {"setting": setting, "results": results},
                       args.out, "images"))  # fmt: skip
    return int(middle["median"] < args.least)


if __name__ == "__main__":
    tune_process()
    sys.exit(main())
