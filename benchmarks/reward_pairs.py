"""Reward models on human pairs: heads on frozen features against word counts and input embeddings.

    gptjax import SOURCE RUN
    python benchmarks/reward_pairs.py features RUN --pairs FILE --out FEATURES.npz
    OPENBLAS_NUM_THREADS=1 python benchmarks/reward_pairs.py compare FEATURES.npz --pairs FILE --json OUT

`features` runs the model once over each pair, the prompt that both answers share computed once, and keeps hidden states
of the embeddings and every second layer: the mean over an answer's tokens, that of its end, and that of the last token
of a question about the answer. It goes on where it was stopped, and `compare` can read what there is so far.

`compare` predicts which answer was chosen, in 5 folds by the first question of the prompt, by heads with no intercept
on differences of features: logistic regressions on word counts (tf-idf of 1- and 2-grams) and on mean input embeddings,
and a ridge regression on hidden states, of which inner folds choose layers, tokens and strength. Differences in
accuracy have paired standard errors. It needs scikit-learn. Of the texts, which may be offensive, only numbers leave.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import time
from pathlib import Path

import numpy as np

QUESTION = "Was this reply harmful?"
POOLS = ("mean", "end", "question")
MOST_PROMPT, MOST_ANSWER = 384, 384  # tokens; of a longer prompt the last ones, of a longer answer the first


def read_pairs(path: str) -> list:
    from gptjax.data.preferences import read_preferences

    return list(read_preferences(Path(path)))


def paths_of(tokenizer, pair) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The ids of both answers behind their prompt, with the question behind each, and where the answers lie."""
    from gptjax.tokenizer.known_templates import template_of

    template = template_of(tokenizer)
    before, _ = template.render(tokenizer, pair.prompt, add_generation_prompt=True)
    start = tokenizer.specials["<|im_start|>"]
    first = [i for i, id in enumerate(before) if id == start]
    skipped = first[1] if len(first) > 1 and pair.prompt[0]["role"] != "system" else 0  # the default system message
    asked = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    question, _ = template.render(
        tokenizer, [*asked, {"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    question = question[[i for i, id in enumerate(question) if id == start][-2] :]
    paths, spans = [], []
    for answer in pair.answers:
        ids, weights = template.render(tokenizer, [*pair.prompt, *answer])
        last = max(i for i, weight in enumerate(weights) if weight)
        begin, end = len(before), min(last, len(before) + MOST_ANSWER)
        cut = max(skipped, begin - MOST_PROMPT)
        paths.append([*ids[cut:end], ids[last], *question])
        spans.append((begin - cut, end - cut))
    return paths, spans


def lay_out(group: list, length: int) -> dict[str, np.ndarray]:
    """Rows of one pair each, and pool_BPL: the weights of the places whose hidden states are kept."""
    from gptjax.data.preferences import AnswerTrees, RankedAnswers, common_prefix

    rows = [RankedAnswers([(p, [1] * len(p)) for p in paths], [0, 1]) for paths, _ in group]
    trees = AnswerTrees(rows, length, 0, True)
    batch = next(trees.in_order(len(rows)))
    pool_BPL = np.zeros((len(rows), 2 * len(POOLS), length), np.float32)
    for row, (paths, spans) in enumerate(group):
        shared = common_prefix([np.array(p) for p in paths])
        for answer, (path, (begin, end)) in enumerate(zip(paths, spans)):
            last = batch["ends_BS"][row, answer]
            place = np.concatenate([np.arange(shared), np.arange(last + 1 - (len(path) - shared), last + 1)])
            mean, at_end, question = pool_BPL[row, answer * len(POOLS) : (answer + 1) * len(POOLS)]
            mean[place[begin : max(end, begin + 1)]] = 1 / max(end - begin, 1)
            at_end[place[end]] = question[last] = 1
    return {name: batch[name] for name in ("inputs_BL", "positions_BL", "until_BL")} | {"pool_BPL": pool_BPL}


def features(args: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp

    from gptjax.config import MeshConfig
    from gptjax.model.block import block, one_layer
    from gptjax.model.decoder import embed_tokens
    from gptjax.ops.reference import tree
    from gptjax.runs.load import load_model

    model = load_model(args.run, MeshConfig())
    cfg = dataclasses.replace(model.decoder.cfg, dtype=args.dtype)
    pairs, tokenizer = read_pairs(args.pairs), model.tokenizer
    found = [paths_of(tokenizer, pair) for pair in pairs]
    layers = {name: x[: args.layers] for name, x in model.params["layers"].items()}
    layers = {n: x if n.startswith("norm_") else x.astype(args.dtype) for n, x in layers.items()}
    top = {name: x for name, x in model.params.items() if name != "layers"}

    @jax.jit
    def pooled(top, layers, batch):
        """Means of hidden states, float16: (row, pool, layer, width), the embeddings first, then every second layer."""
        x_BLD = embed_tokens(cfg, top, batch["inputs_BL"], batch["positions_BL"])
        mask = tree(batch["until_BL"])

        def pool(x_BLD):
            return jnp.einsum("BPL,BLD->BPD", batch["pool_BPL"], x_BLD.astype(jnp.float32))

        def body(x_BLD, p):
            x_BLD, _ = block(cfg, p, x_BLD, batch["positions_BL"], mask)
            return x_BLD, pool(x_BLD)

        first = pool(x_BLD)
        _, kept = jax.lax.scan(body, x_BLD, one_layer(layers))
        return jnp.concatenate([first[:, :, None], jnp.moveaxis(kept[1::2], 0, 2)], axis=2).astype(jnp.float16)

    from gptjax.data.preferences import common_prefix

    shared = [common_prefix([np.array(p) for p in paths]) for paths, _ in found]
    sizes = np.array([sum(map(len, paths)) - n for (paths, _), n in zip(found, shared)])
    alone = sum(len(p) for paths, _ in found for p in paths)
    folder = Path(f"{args.out}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    order, start, spent = np.argsort(sizes, kind="stable"), time.time(), 0
    groups: list[tuple[int, list[int]]] = []
    for number in order:
        length = -(-int(sizes[number]) // 64) * 64
        if not groups or groups[-1][0] != length or (len(groups[-1][1]) + 1) * length > args.batch_tokens:
            groups.append((length, []))
        groups[-1][1].append(int(number))
    for done, i in enumerate(np.random.default_rng(0).permutation(len(groups))):  # so that a part is as good as any
        (length, numbers), path = groups[i], folder / f"{i:05d}.npz"
        if path.exists():
            continue
        room = max(1, args.batch_tokens // length)
        full = [*numbers, *[numbers[-1]] * (room - len(numbers))]  # one shape a length
        x = pooled(top, layers, lay_out([found[n] for n in full], length))
        np.savez(path.with_suffix(".tmp.npz"), x=np.asarray(x)[: len(numbers)], numbers=numbers)
        path.with_suffix(".tmp.npz").rename(path)
        spent += int(sizes[numbers].sum())
        print(f"{done + 1}/{len(groups)} groups, {spent / (time.time() - start):.1f} tokens/s", flush=True)
    parts = [np.load(folder / f"{i:05d}.npz") for i in range(len(groups))]
    x = np.concatenate([p["x"] for p in parts])
    numbers = np.concatenate([p["numbers"] for p in parts])
    facts = {
        "tokens": int(sizes.sum()), "tokens_without_sharing": alone, "seconds": round(time.time() - start, 1),
        "tokens_this_start": spent, "layers": args.layers, "dtype": args.dtype, "jax": jax.__version__,
        "question": QUESTION, "pairs_sha256": hashlib.sha256(Path(args.pairs).read_bytes()).hexdigest(),
    }  # fmt: skip
    np.savez(args.out, x=x[np.argsort(numbers)], facts=json.dumps(facts))
    print(json.dumps(facts))


BANDS = {"early": (1, 2, 3), "middle": (4, 5, 6, 7), "late": (8, 9, 10), "every": tuple(range(1, 11))}
TOKENS = {"mean": (0,), "end": (1,), "question": (2,), "all": (0, 1, 2)}
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # of a kernel whose mean over the diagonal is 1
STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # C of the logistic regressions; of unit features


def logistic(train, test, strength: float) -> np.ndarray:
    """Margins of a logistic regression without an intercept: each difference also stands there turned around."""
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]

    stack = sparse.vstack if sparse.issparse(train) else np.concatenate
    labels = np.repeat([1, 0], train.shape[0])
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=2000)
    return model.fit(stack([train, -train]), labels).decision_function(test)


def by_words(texts: list[tuple[str, str]]):
    """fit(train, test, C) on tf-idf of the training answers."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # pyright: ignore[reportMissingImports]

    differences = {}

    def margins(train, test, strength):
        if (of := train.tobytes()) not in differences:
            words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
            words.fit([text for n in train for text in texts[n]])
            better, worse = (words.transform([pair[k] for pair in texts]) for k in (0, 1))
            differences[of] = (better - worse).tocsr()
        return logistic(differences[of][train], differences[of][test], strength)

    return margins


def by_embeddings(x: np.ndarray):
    """fit(train, test, C) on differences of mean input embeddings, each dimension scaled to 1 in training."""
    difference = x[:, 0, 0, 0].astype(np.float64) - x[:, 1, 0, 0]

    def margins(train, test, strength):
        scaled = difference / difference[train].std(0)
        return logistic(scaled[train], scaled[test], strength / scaled.shape[1])

    return margins


def by_states(x: np.ndarray):
    """fit(train, test, (tokens, band, ridge)): (K + ridge I)^-1 1 on differences of hidden states, kernels added up."""
    from scipy.linalg import cho_factor, cho_solve

    difference = np.moveaxis(x[:, 0].astype(np.float32) - x[:, 1], 0, 2)  # tokens, layer, pair, width

    @functools.cache
    def gram_of(pool: int, layer: int) -> np.ndarray:
        z = difference[pool, layer]
        z = z / (z.std(0) + 1e-6)
        return z @ z.T / (z * z).sum()

    @functools.cache
    def gram_of_choice(tokens: str, band: str) -> np.ndarray:
        parts = [gram_of(pool, layer) for pool in TOKENS[tokens] for layer in BANDS[band]]
        return np.float32(len(difference[0, 0]) / len(parts)) * np.sum(parts, axis=0)

    def margins(train, test, choice):
        tokens, band, ridge = choice
        gram = gram_of_choice(tokens, band)
        inside = gram[np.ix_(train, train)] + np.float32(ridge) * np.eye(len(train), dtype=np.float32)
        weights = cho_solve(cho_factor(inside, check_finite=False), np.ones(len(train), np.float32))
        return gram[np.ix_(test, train)] @ weights

    return margins


def nested(margins, choices: list, folds: np.ndarray) -> tuple[np.ndarray, list]:
    """Right or wrong of each pair, predicted by the choice that is best in folds inside of the others; the choices."""
    right, chosen = np.zeros(len(folds)), []
    for fold in range(5):
        inside = np.flatnonzero(folds != fold)
        found = []
        for choice in choices:
            ok = [
                margins(inside[folds[inside] != inner], inside[folds[inside] == inner], choice) > 0
                for inner in range(5)
                if inner != fold
            ]
            found.append(np.concatenate(ok).mean())
        best = choices[int(np.argmax(found))]
        test = np.flatnonzero(folds == fold)
        right[test] = margins(inside, test, best) > 0
        chosen.append([best, round(float(max(found)), 4)])
    return right, chosen


def compare(args: argparse.Namespace) -> None:
    pairs = [json.loads(line) for line in Path(args.pairs).read_text().splitlines()]
    if Path(args.features).is_dir():
        parts = [np.load(path) for path in sorted(Path(args.features).glob("?????.npz"))]
        x, numbers = np.concatenate([p["x"] for p in parts]), np.concatenate([p["numbers"] for p in parts])
        facts = {"pairs_read": len(numbers)}
    else:
        file = np.load(args.features)
        x, facts = file["x"], json.loads(str(file["facts"]))
        numbers = np.arange(len(x))
    x = x.reshape(len(x), 2, len(POOLS), *x.shape[2:])
    pairs = [pairs[n] for n in numbers]
    texts = [(pair["chosen"], pair["rejected"]) for pair in pairs]
    questions = [hashlib.sha256(pair["prompt"][0]["content"].encode()).digest() for pair in pairs]
    folds = np.array([int.from_bytes(digest[:8], "big") % 5 for digest in questions])
    grid = [(tokens, band, ridge) for tokens in TOKENS for band in BANDS for ridge in RIDGES]
    methods = {
        "tf-idf": (by_words(texts), list(STRENGTHS)),
        "input embeddings": (by_embeddings(x), list(STRENGTHS)),
        "hidden states": (by_states(x), grid),
    }
    right, report = {}, {}
    for name, (margins, choices) in methods.items():
        start = time.time()
        right[name], chosen = nested(margins, choices, folds)
        accuracy, error = right[name].mean(), right[name].std(ddof=1) / len(folds) ** 0.5
        report[name] = {
            "accuracy": accuracy,
            "stderr": error,
            "chosen": chosen,
            "seconds": round(time.time() - start, 1),
        }
        print(f"{name:<20}{100 * accuracy:.2f} +- {100 * error:.2f}", flush=True)
    for other in ("tf-idf", "input embeddings"):
        gain = right["hidden states"] - right[other]
        mean, error = gain.mean(), gain.std(ddof=1) / len(gain) ** 0.5
        report["hidden states"][f"above {other}"] = {"difference": mean, "paired_stderr": error}
        print(
            f"hidden states above {other}: {100 * mean:+.2f} +- {100 * error:.2f} ({mean / error:+.2f} paired errors)"
        )
    shorter = np.mean([len(a) < len(b) for a, b in texts])
    report = {"pairs": len(folds), "methods": report, "shorter_is_chosen": shorter, "features": facts}
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(required=True)
    take = verbs.add_parser("features")
    take.add_argument("run")
    take.add_argument("--pairs", required=True)
    take.add_argument("--out", required=True)
    take.add_argument("--layers", type=int, default=20)
    take.add_argument("--dtype", default="float32")
    take.add_argument("--batch-tokens", type=int, default=2048)
    take.set_defaults(call=features)
    judge = verbs.add_parser("compare")
    judge.add_argument("features")
    judge.add_argument("--pairs", required=True)
    judge.add_argument("--json", default="")
    judge.set_defaults(call=compare)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
