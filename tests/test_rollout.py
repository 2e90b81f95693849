"""Laws of rollouts: the log-probabilities of training, draws that depend on nothing but their keys, prompts as data."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gptjax.align import rollout
from gptjax.align.rollout import Sampler, policy_log_probs
from gptjax.config import DataConfig, MeshConfig, ModelConfig, PolicyConfig, RolloutConfig
from gptjax.config.section import InputError
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.data.prompts import Prompt, PromptData, prompt_of
from gptjax.generation import engine
from gptjax.generation.sampling import draw_ids
from gptjax.model.cache import grow
from gptjax.model.decoder import MASKED, Decoder, init_params
from gptjax.parallel.sharding import make_mesh, on_host, to_global
from gptjax.tokenizer import BytesTokenizer, set_template

LENGTH = 48
GPT2 = ModelConfig(num_layers=1, width=32, num_heads=2, dtype="float32")
LLAMA = ModelConfig(
    num_layers=1, width=32, num_heads=4, queries_per_kv=2, positions="rope", norm="rmsnorm", activation="swiglu",
    biases=False, tied=False, logit_softcap=3.0, dtype="float32",
)  # fmt: skip
TOKENIZER = BytesTokenizer()
CFG = RolloutConfig(answers=3, max_new_tokens=16, temperature=0.7)
TEXTS = ["a", "bcd", "a longer prompt of text", "and", "so on"]


def prompts(texts=TEXTS) -> list[Prompt]:
    return [Prompt(TOKENIZER.prompt_ids(text), {"prompt": text}, "here") for text in texts]


def model(cfg: ModelConfig):
    """A decoder and weights by chance, large ones, so that its distributions are far from uniform."""
    decoder = Decoder(cfg, TOKENIZER.vocab_size, LENGTH)
    params = jax.jit(init_params(decoder))(jax.random.key(0))
    return decoder, jax.tree.map(lambda x: 3 * x, params)


@pytest.fixture(scope="module")
def lm():
    return model(LLAMA)


@pytest.fixture(scope="module")
def drawn(lm):
    return sampler(lm[0]).draw(lm[1], prompts(), first=0, step=1)


def sampler(decoder, cfg: RolloutConfig = CFG, longest: int = 24, seed: int = 0) -> Sampler:
    made = Sampler(decoder, TOKENIZER, cfg, length=LENGTH, longest=longest, seed=seed)
    made._stops = (*made._stops, *range(60, 68))  # ids that occur
    return made


def answers(drawn: rollout.Rollout, given: list[Prompt]) -> list[list[list[int]]]:
    """The ids of the answers to each prompt."""
    each = len(drawn.ids) // len(given)
    return [[ids[len(prompt.ids) :] for ids in drawn.ids[i * each : (i + 1) * each]] for i, prompt in enumerate(given)]


@pytest.mark.parametrize("cfg", [LLAMA, pytest.param(GPT2, marks=pytest.mark.slow)], ids=["llama", "gpt2"])
def test_the_samplers_log_probabilities_are_those_of_training(cfg, lm):
    """At the temperature of sampling, over the ids that can be drawn: by the full forward pass, and by hand."""
    decoder, params = lm if cfg == LLAMA else model(cfg)
    made = sampler(decoder)
    batch = made.draw(params, prompts(), first=0, step=1).batch
    of_training = jax.jit(policy_log_probs(decoder, made.vocab_size, CFG.temperature))
    log_p_BL, _ = of_training(params, {}, batch)
    gap_BL = np.abs(np.asarray(log_p_BL) - batch["sampled_log_p_BL"]) * batch["mask_BL"]
    assert gap_BL.max() <= 2e-4 and batch["mask_BL"].sum() > 100
    assert not (batch["sampled_log_p_BL"] * (1 - batch["mask_BL"])).any()
    names = ("inputs_BL", "positions_BL", "segments_BL")

    @jax.jit
    def logits(params):
        x_BLD, _ = decoder.apply({"params": params}, *(batch[name] for name in names))
        return decoder.apply({"params": params}, x_BLD, method="logits")

    logits_BLV = np.asarray(logits(params), np.float64)[..., :258] / 0.7
    log_z_BL = np.log(np.exp(logits_BLV).sum(-1))
    picked_BL = np.take_along_axis(logits_BLV, batch["targets_BL"][..., None], -1)[..., 0]
    by_hand_BL = (picked_BL - log_z_BL) * batch["mask_BL"]
    np.testing.assert_allclose(batch["sampled_log_p_BL"], by_hand_BL, atol=2e-4)
    assert by_hand_BL.min() < -3, "some tokens are unlikely"


def test_a_row_is_a_prompt_and_its_answer_and_the_mask_is_the_answers(lm, drawn):
    made, given = sampler(lm[0]), prompts()
    batch, ended = drawn.batch, []
    for row, ids in enumerate(drawn.ids):
        asked, n = given[row // 3].ids, len(ids) - 1
        assert ids[: len(asked)] == list(asked)
        assert batch["inputs_BL"][row].tolist() == ids[:-1] + [0] * (LENGTH - n)
        assert batch["targets_BL"][row].tolist() == ids[1:] + [0] * (LENGTH - n)
        assert batch["positions_BL"][row].tolist() == [*range(n)] + [0] * (LENGTH - n)
        assert batch["segments_BL"][row].tolist() == [1] * n + [0] * (LENGTH - n)
        mask = [0.0] * (len(asked) - 1) + [1.0] * (len(ids) - len(asked))
        assert batch["mask_BL"][row].tolist() == mask + [0.0] * (LENGTH - len(mask))
        ended.append(ids[-1] in made._stops)
        assert ended[-1] or len(ids) - len(asked) == 16, "an answer that is cut off has all its tokens"
        assert not set(ids[len(asked) : -1]) & set(made._stops)
        answer = ids[len(asked) : len(ids) - ended[-1]]
        assert drawn.texts[row] == TOKENIZER.decode(answer)
    assert batch["ended_B"].tolist() == ended and any(ended) and not all(ended)


def test_an_answer_depends_on_its_numbers_alone(lm, monkeypatch):
    """Seed, step, number of the prompt and of the answer; not on the batch, nor on where the cache grew."""
    decoder, params = lm
    made, given = sampler(decoder), prompts()
    whole = answers(made.draw(params, given, first=7, step=4), given)
    assert whole == answers(made.draw(params, given, first=7, step=4), given)
    for i, prompt in enumerate(given):
        assert answers(made.draw(params, [prompt], first=7 + i, step=4), [prompt]) == [whole[i]]
    same = prompts(["a"] * 4)
    drawn = answers(made.draw(params, same, first=0, step=0), same)
    assert len({tuple(answer) for each in drawn for answer in each}) == 12, "copies of a prompt are answered apart"
    assert answers(made.draw(params, given, first=7, step=5), given) != whole
    assert answers(sampler(decoder, seed=1).draw(params, given, first=7, step=4), given) != whole
    sizes = []
    monkeypatch.setattr(rollout, "headroom", lambda rows: 4)
    monkeypatch.setattr(rollout, "grow", lambda state, slots: (sizes.append(slots), grow(state, slots))[1])
    assert answers(made.draw(params, given, first=7, step=4), given) == whole
    assert sizes == [48]


def test_other_prompts_need_no_new_program_and_weights_are_laid_out_once(lm, monkeypatch):
    made, laid_out = sampler(lm[0]), []
    made.draw(lm[1], prompts(), first=0, step=0)
    programs = [engine.prefill, engine.decode, engine.repeat_rows]
    before = [f._cache_size() for f in programs]  # pyright: ignore[reportFunctionMemberAccess]
    layout = rollout.decode_params
    monkeypatch.setattr(rollout, "decode_params", lambda *args: (laid_out.append(1), layout(*args))[1])
    made.draw(lm[1], prompts(["x", "y", "z", "xyz", "zzz"]), first=50, step=3)
    assert [f._cache_size() for f in programs] == before  # pyright: ignore[reportFunctionMemberAccess]
    assert len(laid_out) == 1


def test_ids_without_a_token_are_never_drawn_and_have_no_probability(lm):
    decoder, params = lm
    wide = decoder.clone(vocab_size=300)
    params = params | {"embed_VD": params["embed_VD"].at[258:].set(9.0)}
    made = sampler(wide)
    batch = made.draw(params, prompts(), first=0, step=1).batch
    assert made.vocab_size == 258 and (batch["targets_BL"] < 258).all()
    log_p_BL, _ = jax.jit(policy_log_probs(wide, made.vocab_size, CFG.temperature))(params, {}, batch)
    assert (np.abs(np.asarray(log_p_BL) - batch["sampled_log_p_BL"]) * batch["mask_BL"]).max() <= 2e-4


def test_ids_are_drawn_as_often_as_their_probability_says():
    """20,000 rows of one distribution over 300 ids, of which some are masked: chi-squared, and log p by hand."""
    logits_V = np.random.default_rng(0).normal(size=384).astype(np.float32) * 2
    logits_V[300:] = MASKED
    key_B = jax.random.split(jax.random.key(0), 20_000)
    ids_B, log_p_B = map(np.asarray, draw_ids(np.tile(logits_V, (20_000, 1)), key_B, 1.5))
    p_V = np.exp(logits_V.astype(np.float64) / 1.5)
    p_V /= p_V.sum()
    np.testing.assert_allclose(log_p_B, np.log(p_V[ids_B]), atol=1e-5)
    expected_V, found_V = 20_000 * p_V[:300], np.bincount(ids_B, minlength=384)
    assert not found_V[300:].any()
    rare_V = expected_V < 10
    squares = ((found_V[:300] - expected_V) ** 2 / expected_V)[~rare_V].sum()
    count = (~rare_V).sum()
    assert count > 100 and squares < count + 4 * (2 * count) ** 0.5


@pytest.mark.slow
def test_a_mesh_draws_the_same_answers(lm):
    decoder, params = lm
    given = prompts([*TEXTS, "x", "y", "z"])
    cfg = dataclasses.replace(CFG, answers=4)
    want = sampler(decoder, cfg).draw(params, given, first=0, step=1)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        sharded = to_global(on_host(params), mesh)
        got = sampler(decoder, cfg).draw(sharded, given, first=0, step=1)
    assert got.ids == want.ids
    np.testing.assert_allclose(got.batch["sampled_log_p_BL"], want.batch["sampled_log_p_BL"], atol=2e-5)


# Prompts as data


def data(tmp_path, records, template: str = "") -> PromptData:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    cfg = DataConfig(source=str(path), batch_size=12, length=LENGTH, validation_fraction=0.25)
    tokenizer = TokenizerConfig(kind="bytes", vocab_size=258, template=template)
    config = PolicyConfig(data=cfg, tokenizer=tokenizer, epochs=2.0, init="base", rollout=CFG)
    return PromptData(config, tmp_path / "run" / "data", training=True)


def test_prompts_are_ordered_by_the_seed_held_out_by_their_text_and_keep_their_fields(tmp_path):
    records = [{"prompt": f"prompt {i}", "answer_is": i} for i in range(60)] + [{"prompt": "x" * 40}]
    made = data(tmp_path, records)
    train, held = ({p.record["answer_is"] for p in side} for side in (made.train, made.held))
    assert train | held == set(range(60)) and not train & held and 5 < len(held) < 28
    assert made.too_long == 1 and "1 of more than 32 tokens" in made.describe()
    n = len(train)
    assert made.steps == -(-2 * n * 3 // 12)
    orders = [[p.record["answer_is"] for p in made.prompts(epoch * n, n)] for epoch in range(2)]
    assert set(orders[0]) == set(orders[1]) == train and orders[0] != orders[1]
    assert [p.record["answer_is"] for p in made.prompts(5, 4)] == orders[0][5:9], "from any place"
    turned = data(tmp_path, records[::-1])
    assert {p.record["answer_is"] for p in turned.held} == held, "the order of the file holds out no others"
    batch = made.batch(12)
    assert batch["inputs_BL"][3, : len(made.prompts(5, 1)[0].ids)].tolist() == list(made.prompts(5, 1)[0].ids)
    assert made.start["content"] != turned.start["content"]
    with pytest.raises(InputError, match="content was changed, or the template is"):
        made.check(turned.start)


def test_a_template_makes_messages_of_prompts_and_without_one_they_are_text(tmp_path):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    chat = BytesTokenizer()
    set_template(chat, "llama2")
    asked = prompt_of({"prompt": "hello"}, "here", chat)
    assert asked == prompt_of({"prompt": [{"role": "user", "content": "hello"}]}, "here", chat)._replace(
        record=asked.record
    )
    assert b"[INST] hello [/INST]" in chat.decode_bytes(asked.ids) and asked.text == "hello"
    assert prompt_of({"prompt": messages, "key": 1}, "here", chat).record == {"prompt": messages, "key": 1}
    plain = prompt_of({"prompt": "hello"}, "here", TOKENIZER)
    assert plain.ids == TOKENIZER.prompt_ids("hello")
    wrong = {
        "here has the fields text; wanted": {"text": "x"},
        "here: its prompt has messages, and the tokenizer no chat template": {"prompt": messages},
        "here: the prompt ends with assistant; wanted": {"prompt": messages[:2]},
        "here has 'x'; wanted": "x",
    }
    for said, record in wrong.items():
        with pytest.raises(InputError, match=said):
            prompt_of(record, "here", TOKENIZER)
    with pytest.raises(InputError, match="1 of 2 prompts leave room for rollout.max_new_tokens=16 in data.length=48"):
        data(tmp_path, [{"prompt": "x"}, {"prompt": "x" * 40}])
