"""Reward models: accuracy and calibration on held-out preferences, and scores of answers by ids."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.config import MeshConfig
from gptjax.config.section import InputError
from gptjax.data.preferences import PromptRows
from gptjax.evals.metrics import mean
from gptjax.model.decoder import Decoder
from gptjax.model.heads import answer_scores
from gptjax.parallel.sharding import local_rows, on_host, shardings, to_global
from gptjax.runs.load import LoadedModel, load_model
from gptjax.runs.run import Run
from gptjax.storage import filesystem, write_json

BINS = 10  # of confidence, from 1/2 to 1
LEAST = 32  # tokens of the shortest rows that answers are scored in


def make_score_step(decoder: Decoder, mesh: Mesh, params: Any, batch: Any) -> Callable:
    """Builds score_step(params, batch) -> score_BS, compiled for the mesh; see `model.heads.answer_scores`."""
    score = functools.partial(answer_scores, decoder)
    return jax.jit(score, in_shardings=(shardings(params, mesh), shardings(batch, mesh)))


def evaluate_preferences(
    score_step: Callable, params: Any, held: PromptRows, batch_size: int, max_rows: int, mesh: Mesh
) -> tuple[dict[str, float], list[list[float]]]:
    """The numbers and the reliability table of held-out prompts, or the first max_rows (0: all): see `pair_metrics`."""
    rows = local_rows(batch_size, mesh)
    found: list[tuple[np.ndarray, ...]] = []
    for batch in held.in_order(batch_size, max_rows):
        part = {name: x[rows.numbers] for name, x in batch.items()}
        score_BS = on_host(score_step(params, to_global(part, mesh, rows)))
        found.append((score_BS, batch["rank_BS"], batch["mask_BS"]))
    return pair_metrics(*(np.concatenate(x) for x in zip(*found)))


def pair_metrics(
    score_BS: np.ndarray, rank_BS: np.ndarray, mask_BS: np.ndarray
) -> tuple[dict[str, float], list[list[float]]]:
    """Numbers of the pairs of each prompt's answers, and [least confidence, pairs, confidence, accuracy] of each bin.

    eval_loss is the mean over prompts of -log sigmoid(margin) over their pairs, eval_accuracy that of margin > 0, with
    its standard error over prompts. A pair is decided with confidence sigmoid(|margin|), and eval_calibration_error is
    the expected calibration error: the mean over pairs of |accuracy - confidence| of their bin (Guo et al. 2017).
    """
    better_BSS = (rank_BS[:, :, None] < rank_BS[:, None, :]) & (mask_BS[:, :, None] * mask_BS[:, None, :] > 0)
    margin_BSS = score_BS[:, :, None].astype(np.float64) - score_BS[:, None, :]
    of_prompts = [margin_SS[better_SS] for margin_SS, better_SS in zip(margin_BSS, better_BSS) if better_SS.any()]
    margins = np.concatenate(of_prompts)
    accuracy = mean([np.mean(x > 0) for x in of_prompts])
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), margins > 0
    bins, table = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1), []
    for number in np.unique(bins):
        of_bin = bins == number
        row = 0.5 + number / 2 / BINS, of_bin.sum(), confidence[of_bin].mean(), right[of_bin].mean()
        table.append([float(x) for x in row])
    first_B = mask_BS[:, 0] > 0
    metrics = {
        "eval_loss": np.mean([np.logaddexp(0, -x).mean() for x in of_prompts]),
        "eval_accuracy": accuracy.value,
        "eval_accuracy_stderr": accuracy.stderr,
        "eval_calibration_error": sum(n / len(margins) * abs(a - c) for _, n, c, a in table),
        "eval_margin": margins.mean(),
        "eval_score_best": score_BS[first_B, 0].mean(),
    }
    return {name: float(x) for name, x in metrics.items()} | {"eval_pairs": len(margins)}, table


class AnswerScorer:
    """Scores of answers by a reward model whose parameters lie on a mesh, less `mean`.

    Answers are padded to powers of two and computed in batches of `batch_tokens` tokens a device, so that few programs
    are compiled. What else is in a batch changes a score by rounding only.
    """

    def __init__(self, decoder: Decoder, params: Any, mesh: Mesh, mean: float = 0.0, *, batch_tokens: int = 2048):
        self.decoder, self.params, self.mesh, self.mean = decoder, params, mesh, mean
        self.batch_tokens = batch_tokens

    def __call__(self, answers: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """float32 scores of answers: the ids of a prompt and the answer behind it, with the token that ends it.

        Raises InputError for one that is empty or longer than the model's context.
        """
        scores, limit = np.zeros(len(answers), np.float32), self.decoder.context
        buckets: dict[int, list[int]] = {}
        for number, ids in enumerate(answers):
            if not 0 < len(ids) <= limit:
                raise InputError(
                    f"answer {number} has {len(ids)} tokens with its prompt; wanted 1 to {limit}, the data.length of "
                    "the reward model"
                )
            buckets.setdefault(min(max(LEAST, 1 << (len(ids) - 1).bit_length()), limit), []).append(number)
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        for length, numbers in sorted(buckets.items()):
            size = shards * max(1, self.batch_tokens // length)
            for first in range(0, len(numbers), size):
                some = numbers[first : first + size]
                with jax.set_mesh(self.mesh):
                    batch = to_global(_padded([answers[n] for n in some], size, length), self.mesh)
                    scores[some] = on_host(_scores(self.decoder, self.params, batch))[: len(some), 0]
        return scores - np.float32(self.mean)


def _padded(answers: Sequence[Sequence[int] | np.ndarray], size: int, length: int) -> dict[str, np.ndarray]:
    batch = {name: np.zeros((size, length), np.int32) for name in ("inputs_BL", "segments_BL")}
    batch["positions_BL"] = np.tile(np.arange(length, dtype=np.int32), (size, 1))
    batch["ends_BS"] = np.zeros((size, 1), np.int32)
    for row, ids in enumerate(answers):
        batch["inputs_BL"][row, : len(ids)], batch["segments_BL"][row, : len(ids)] = ids, 1
        batch["ends_BS"][row] = len(ids) - 1
    return batch


_scores = functools.partial(jax.jit, static_argnums=0)(answer_scores)


def load_scorer(run_dir: str | Path, mesh_cfg: MeshConfig | None, step: int = 0) -> tuple[AnswerScorer, LoadedModel]:
    """The reward model of a run at a checkpoint (0: the newest) with its scores normalised, and what it was read from.

    Raises InputError where the run is no reward model, is not finished, or another step was normalised.
    """
    model = load_model(run_dir, mesh_cfg, step, heads=("score_D",))
    normal = read_scores(model.run)
    if normal.get("step") != model.step:
        at = f"step {normal['step']} alone" if normal else "the last step, which is still to come"
        raise InputError(
            f"{run_dir}: scores are normalised at {at}; wanted step {model.step}: gptjax reward {run_dir} goes on"
        )
    return AnswerScorer(model.decoder, model.params, model.mesh, normal["mean"]), model


def read_scores(run: Run) -> dict[str, Any]:
    """The step at which a run's scores were normalised with their "mean" and what else is known; {} before that."""
    path = run.scores_path
    return json.loads(filesystem(run.folder).read(path)) if filesystem(run.folder).is_file(path) else {}


def write_scores(run: Run, step: int, scores: np.ndarray, more: dict[str, Any]) -> None:
    """Writes the mean and standard deviation of the demonstrations' scores at a step into a run's folder."""
    found = {"step": step, "mean": float(scores.mean()), "std": float(scores.std()), "demonstrations": len(scores)}
    write_json(run.scores_path, found | more)


def evaluate_reward(model: LoadedModel, held: PromptRows, max_rows: int = 0) -> dict[str, float]:
    """The numbers of a reward model that is open on held-out preferences."""
    batch_size = model.config.data.batch_size
    decoder, params = model.decoder, model.params
    with jax.set_mesh(model.mesh):
        example = held.lay_out([None] * batch_size)
        score_step = make_score_step(decoder, model.mesh, params, example)
        return evaluate_preferences(score_step, params, held, batch_size, max_rows, model.mesh)[0]
