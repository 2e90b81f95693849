"""Laws of rows with images: nothing is cut, an image is there once for all of its questions, and no loss changes."""

import dataclasses
import io
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gptjax.config import DataConfig, ModelConfig, SftConfig, TokenizerConfig, VisionConfig
from gptjax.config.section import InputError
from gptjax.data import chats, pictures
from gptjax.data.chats import ChatData
from gptjax.data.image_rows import ImageConversation, ImageRows, place_id, place_images
from gptjax.data.images import Picture, image_patches
from gptjax.data.pictures import PictureFile
from gptjax.model.decoder import head, hidden_states, init_params, make_decoder
from gptjax.tokenizer import BytesTokenizer
from gptjax.tokenizer.known_templates import named_template

pytestmark = pytest.mark.usefixtures("compile_cache")
VISION = VisionConfig(patch=4, side=8, begin=(1,), end=(2, 3))  # 4 tokens, 7 with those around
LENGTH = 40


def png(number: int) -> bytes:
    """A picture of a colour of its own."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 37 % 256, number * 11 % 256, number)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def store(tmp_path) -> PictureFile:
    return PictureFile(VISION, tmp_path)


def conversations(store: PictureFile, count: int = 60, seed: int = 0) -> list[ImageConversation]:
    """Several questions of an image, some of two images, of none, and of one behind an answer."""
    rng, made = random.Random(seed), []
    for n in range(count):
        picture = Picture.of(png(n // 4), f"{n}")
        other = Picture.of(png(rng.randrange(count)), f"{n}")
        question = [rng.randint(10, 12) for _ in range(rng.randint(1, 5))]
        answer = [rng.randint(20, 99) for _ in range(rng.randint(1, 4))]
        kind = n % 8
        ids, shown = {
            3: ([9, *question], []),
            5: ([9, -1, *question, -2], [picture, other]),
            6: ([9, *answer, -1, *question], [picture]),
        }.get(kind, ([9, -1, *question], [picture]))
        weights = [0] * len(ids) if kind != 6 else [0, *[1] * len(answer), 0, *[0] * len(question)]
        for one in shown:
            store.add(one)
        keys = [one.key for one in shown]
        made.append(
            ImageConversation(
                *place_images([*ids, *answer], [*weights, *[1] * len(answer)], keys, VISION), keys, f"{n}"
            )
        )
    return made


def whole(batch) -> list[tuple]:
    """(ids, weights of the targets, patches of each place) of each conversation of a batch, as a query sees them."""
    found = []
    for row in range(len(batch["inputs_BL"])):
        get = {name: x[row] for name, x in batch.items()}
        for segment in range(1, get["segments_BL"].max() + 1):
            (own,) = np.nonzero(get["segments_BL"] == segment)
            last = own[-1]
            seen = [m for m in range(last + 1) if get["until_BL"][m] > last]
            assert get["positions_BL"][seen].tolist() == list(range(len(seen))), "positions go on from the prefix"
            ids = get["inputs_BL"][seen]
            tokens = get["patches_BIPY"].reshape(-1, get["patches_BIPY"].shape[-1])  # of a patch, here
            shown = [(-1 if i < 0 else tokens[i].tobytes()) for i in get["index_BL"][seen]]
            assert not any(i and token != -1 for i, token in zip(ids, shown)), "the id of an image's place is 0"
            weights = get["weights_BL"][seen]
            weights[: len(seen) - len(own)] = 0  # a prefix of others
            found.append(([*ids, get["targets_BL"][last]], weights.tolist(), shown))
    return found


def test_every_conversation_is_whole_with_its_images_and_comes_once_an_epoch(store):
    given = conversations(store)
    for share in (True, False):
        rows = ImageRows(given, LENGTH, store, share=share)
        batch = rows.batch(0, rows.num_rows)
        assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
            n: (x.shape, x.dtype) for n, x in rows.example(rows.num_rows).items()
        }
        patches = {place_id(key): [x.tobytes() for x in store.patches([key])[0]] for c in given for key in c.keys}
        wanted = []
        for c in given:
            shown, counts = [], {}
            for i in c.ids[:-1]:
                if i >= 0:
                    shown.append(-1)
                else:
                    counts[i] = counts.get(i, -1) + 1
                    shown.append(patches[i][counts[i] % 4])
            wanted.append(([max(i, 0) for i in c.ids], list(c.weights[1:]), shown))
        order = lambda found: sorted(found, key=repr)  # noqa: E731
        assert order(whole(batch)) == order(wanted)
        assert order(whole(rows.batch(rows.num_rows, rows.num_rows))) == order(wanted), "and so the next time"
        assert order(w for b in rows.in_order(4) for w in whole(b)) == order(wanted)
        if share:
            shared, tokens = rows.num_rows, np.count_nonzero(batch["segments_BL"])
    assert shared < rows.num_rows and tokens < 0.8 * np.count_nonzero(batch["segments_BL"])


def test_what_is_shared_ends_before_every_answer_and_holds_the_whole_image(store):
    picture, other = Picture.of(png(1), "1"), Picture.of(png(2), "2")
    for one in (picture, other):
        store.add(one)

    def rows(*pairs, keys=(picture.key,), length=LENGTH):
        given = [place_images(ids, weights, keys, VISION) for ids, weights in pairs]
        return ImageRows([ImageConversation(*pair, keys) for pair in given], length, store)

    def sizes(laid: ImageRows) -> list[list[int]]:
        return [np.bincount(row)[1:].tolist() for row in laid.batch(0, laid.num_rows)["segments_BL"]]

    # 9, 7 tokens of the image, 10, 20: the next token, 20, is of an answer, so 10 is there again.
    assert sizes(rows(([9, -1, 10, 20], [0, 0, 0, 1]), ([9, -1, 10, 21], [0, 0, 0, 1]))) == [[9, 1]]
    assert sizes(rows(([9, -1, 10, 20], [0, 0, 0, 1]), ([9, -1, 11, 20], [0, 0, 0, 1]))) == [[9, 1]]
    assert sizes(rows(([9, -1, 10, 11, 20], [0] * 4 + [1]), ([9, -1, 10, 12, 20], [0] * 4 + [1]))) == [[10, 1]]
    # Equal answers in front of an image are learned as often as they are there.
    assert sizes(rows(*[([9, 20, -1, 10, 21], [0, 1, 0, 0, 1])] * 2)) == [[10, 10]]
    assert sizes(rows(([9, -1, 10, 20], [0, 0, 0, 1]), ([8, -1, 10, 20], [0, 0, 0, 1]))) == [[9, 9]], "another text"
    # A group that does not fit has its image again in another row.
    many = [([9, -1, 10 + n, 20, 21], [0, 0, 0, 1, 1]) for n in range(9)]
    assert sorted(sizes(rows(*many, length=14))) == [[10, 2, 2]] * 3
    laid = rows(*many, length=14)
    assert (laid.most_images, laid.num_images) == (1, 1)
    batch = laid.batch(0, 1, np.array([0]))
    assert batch["last_BL"][0].tolist() == [0, 1, 5, 5, 5, 5, *range(6, 14)]
    assert batch["index_BL"][0].tolist() == [-1, -1, 0, 1, 2, 3, *[-1] * 8]
    causal = dataclasses.replace(VISION, sees_all=False)
    store.vision = causal
    assert rows(*many).batch(0, 1)["last_BL"][0].tolist() == list(range(LENGTH))
    store.vision = VISION
    twice = rows(([9, -1, -2, 10, 20], [0, 0, 0, 0, 1]), keys=(picture.key, picture.key)).batch(0, 1)
    assert twice["patches_BIPY"].shape[1] == 1 and twice["index_BL"][0].tolist().count(3) == 2, (
        "one picture, two places"
    )


def test_packing_and_sharing_change_no_loss(store, highest_precision):
    """-log p of every token of an answer is what it is alone in a row, also where an image sees itself whole."""
    given = conversations(store, 24)
    vision = dataclasses.replace(VISION, layers=1, width=16, num_heads=2)
    model = ModelConfig(num_layers=1, width=16, num_heads=2, positions="rope", dtype="float32", vision=vision)
    config = SftConfig(
        init="scratch",
        model=model,
        data=DataConfig(length=LENGTH),
        tokenizer=TokenizerConfig(kind="bytes", vocab_size=258),
    )
    decoder = make_decoder(config)
    params = jax.jit(init_params(decoder))(jax.random.key(0))

    @jax.jit
    def nats(batch):
        x_BLD, _ = hidden_states(decoder, params, batch)
        log_p_BLV = jax.nn.log_softmax(jnp.einsum("BLD,VD->BLV", 9 * x_BLD, head(params)))
        return -jnp.take_along_axis(log_p_BLV, batch["targets_BL"][..., None], axis=-1)[..., 0]

    def losses(*laid: ImageRows) -> dict[tuple, list[float]]:
        """The losses by the targets and their places, all rows in one batch."""
        for rows in laid:
            rows.num_images = 4
        batches = [rows.batch(0, rows.num_rows) for rows in laid]
        batch = {n: np.concatenate([b[n] for b in batches]) for n in batches[0]}
        batch = {n: np.concatenate([x, np.repeat(x[:1], len(given) - len(x), axis=0)]) for n, x in batch.items()}
        nats_BL = np.asarray(nats(batch), np.float64)
        found: dict[tuple, list[float]] = {}
        for row in range(sum(rows.num_rows for rows in laid)):
            for segment in range(1, batch["segments_BL"][row].max() + 1):
                (own,) = np.nonzero((batch["segments_BL"][row] == segment) & (batch["weights_BL"][row] > 0))
                name = tuple(batch["targets_BL"][row][own]), tuple(own - own[0])
                found[name] = sorted([*found.get(name, []), *nats_BL[row][own]])
        return found

    packed = losses(ImageRows(given, LENGTH, store))
    alone = losses(*(ImageRows([c], LENGTH, store) for c in given))
    assert packed.keys() == alone.keys()
    for name, values in packed.items():
        np.testing.assert_allclose(values, alone[name], rtol=2e-5)
    blind = [c._replace(keys=[c.keys[0]] * len(c.keys)) if c.keys else c for c in given]
    shown = losses(ImageRows(blind, LENGTH, store))
    assert any(not np.allclose(shown[name], values, rtol=1e-4) for name, values in packed.items()), "images matter"


def test_places_are_those_of_the_template_and_no_text_spells_one(store):
    template, tokenizer = named_template("llama2"), BytesTokenizer()
    asked = [{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": "b? "}, {"type": "image"}]
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": "c"}]
    ids, weights = template.render(tokenizer, said)
    assert bytes(i for i in ids if 0 <= i < 256) == b"[INST] a b?  [/INST] c ", "what an image ends is not trimmed"
    assert [i for i in ids if i < 0] == [-1, -2] and not any(w for i, w in zip(ids, weights) if i < 0)
    text = [said[0] | {"content": " a b? "}, said[1]]
    parts = [said[0] | {"content": [asked[0] | {"text": " a "}, asked[2]]}, said[1]]
    assert template.render(tokenizer, parts) == template.render(tokenizer, [text[0] | {"content": " a b? "}, text[1]])
    with pytest.raises(InputError, match="message 1, of role 'assistant', holds an image"):
        template.render(tokenizer, [said[0], {"role": "assistant", "content": [{"type": "image"}]}])
    keys = [Picture.of(png(n), "").key for n in (1, 2)]
    placed, placed_weights = place_images(ids, weights, keys, VISION)
    assert [i for i in placed if i < 0] == [place_id(keys[0])] * 4 + [place_id(keys[1])] * 4
    assert len(placed) == len(placed_weights) == len(ids) + 2 * 6 and sum(placed_weights) == sum(weights)
    at = placed.index(place_id(keys[0]))
    assert (placed[at - 1], placed[at + 4 : at + 6]) == (1, [2, 3])
    for wrong in (keys[:1], [*keys, keys[0]]):
        with pytest.raises(InputError, match="has 2 places for [13] images; wanted as many"):
            place_images(ids, weights, wrong, VISION)
    assert -(2**60) <= place_id("f" * 64) < place_id("0" * 64) == -1


def test_pictures_are_kept_once_and_decoded_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "CACHE_BYTES", 3 * 192)
    store = PictureFile(VISION, tmp_path / "nope" / "data")
    many = [Picture.of(png(n % 9), f"p{n}") for n in range(30)]
    for picture in many:
        store.add(picture)
    assert len(store) == 9 and not list(tmp_path.iterdir()), "the file has no name"
    keys = [picture.key for picture in many]
    for _ in range(2):
        for picture, patches_PY in zip(many, store.patches(keys)):
            np.testing.assert_array_equal(patches_PY, image_patches(picture.content, "", VISION))
    assert sum(x.nbytes for x in store._decoded.values()) == 3 * 192
    store.check()
    for content in (many[0].content[:50], b"", b"no picture"):
        damaged = PictureFile(VISION, tmp_path)
        damaged.add(many[0])
        damaged.add(Picture.of(content, "chat.jsonl:7: image 1"))
        with pytest.raises(InputError, match=r"^chat.jsonl:7: image 1"):
            damaged.check()


def write(folder: Path, count: int = 20) -> SftConfig:
    """A folder of pictures and a file of questions beside them; a long one, and a text alone."""
    folder.mkdir(exist_ok=True)
    records = []
    for n in range(count):
        (folder / f"{n}.png").write_bytes(png(n))
        records += [{"image": f"{n}.png", "question": q, "answer": f"{n}"} for q in ("what", "how?")]
    records.insert(3, {"image": "0.png", "question": "x" * 199, "answer": "y"})
    records.append({"prompt": "hello", "completion": "you"})
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    model = ModelConfig(num_layers=1, width=16, num_heads=2, dtype="float32", vision=VISION)
    return SftConfig(
        init="scratch",
        model=model,
        data=DataConfig(source=str(folder), batch_size=4, length=128, validation_fraction=0.2),
        tokenizer=TokenizerConfig(kind="bytes", vocab_size=258, template="llama2"),
    )


def test_the_questions_of_an_image_are_held_out_together_and_what_is_left_out_is_named(tmp_path):
    config = write(tmp_path / "d")
    data = ChatData(config, tmp_path / "run" / "data", training=True)
    long = tmp_path / "d" / "records.jsonl:4"
    assert f"left out: 1 of more than 129 tokens (the first, {long}, has 226, 4 of them of images)" in data.describe()
    assert "; 20 images, at most 2 in a row" in data.describe()
    held = [x for batch in data.held.batches(0) for x in whole(batch)]
    trained = whole(data.train.batch(0, data.train.num_rows))
    images = [{token for _, _, shown in some for token in shown if token != -1} for some in (trained, held)]
    assert len(trained) + len(held) == 41 and len(held) >= 2 and not images[0] & images[1]
    some = np.array([1, 3])
    for n, x in data.batch(0).items():
        np.testing.assert_array_equal(data.batch(0, some)[n], x[some])
    with pytest.raises(InputError, match=r"jsonl:1 holds an image, and model.vision.patch=0 reads none; train with"):
        text = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=VisionConfig()))
        ChatData(text, tmp_path / "run" / "data", training=True)
    with pytest.raises(InputError, match=r"none of 42 .* \(the first, .*jsonl:1, has \d+, 4 of them of images\)"):
        short = dataclasses.replace(config, data=dataclasses.replace(config.data, length=8))
        ChatData(short, tmp_path / "run" / "data", training=True)


def test_a_run_goes_on_with_the_same_pictures_alone_and_other_decoders_are_named(tmp_path, capsys, monkeypatch):
    config = write(tmp_path / "d")
    begun = ChatData(config, tmp_path / "run" / "data", training=True)
    again = ChatData(config, tmp_path / "run" / "data", training=True, resumes=True)
    again.check(begun.start)
    assert again.start == begun.start and not capsys.readouterr().err
    for n, x in begun.batch(8).items():
        np.testing.assert_array_equal(again.batch(8)[n], x)
    monkeypatch.setattr(chats, "decoder_versions", lambda: begun.start["decoders"] | {"zlib": "9.9"})
    ChatData(config, tmp_path / "run" / "data", training=True, resumes=True).check(begun.start)
    said = capsys.readouterr().err
    assert "warning: this run began with zlib" in said and "now 9.9" in said and said.count("\n") == 1
    (tmp_path / "d" / "7.png").write_bytes(png(777))
    with pytest.raises(InputError, match="is not what it was when this run was trained on it"):
        ChatData(config, tmp_path / "run" / "data", training=True, resumes=True).check(begun.start)
    (tmp_path / "d" / "7.png").write_bytes(png(7)[:60])
    with pytest.raises(InputError, match=r"jsonl:16: image 1 \(7.png\)"):
        ChatData(config, tmp_path / "run" / "data", training=True)
