"""Reward models on human pairs: heads on frozen features against word counts and input embeddings.

    gptjax import SOURCE RUN
    python benchmarks/reward_pairs.py features RUN --pairs FILE --out FEATURES.npz
    python benchmarks/reward_pairs.py compare FEATURES.npz --pairs FILE --json OUT

`features` runs the model once over each pair, the prompt that both answers share computed once, and keeps hidden states
of every second layer: the mean over an answer's tokens, that of its end, and that of the last token of a question about
the answer. It goes on where it was stopped. `compare` fits logistic regressions on the differences between chosen and
rejected, without an intercept, in 5 folds by prompt; strength and layers are chosen by folds inside of the four. It
needs scikit-learn. Of the texts, which may be offensive, only numbers leave.
"""

import argparse
import dataclasses
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
    from gptjax.model.block import block
    from gptjax.model.decoder import embed_tokens, one_layer
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
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
