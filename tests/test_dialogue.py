"""Laws of conversations: whole, each once an epoch, and the assistant's tokens alone count."""

import base64
import gzip
import itertools
import json

import numpy as np
import pytest

from gptjax.config.section import InputError
from gptjax.data.dialogue import ConversationRows, messages_of, pack_best_fit, read_conversations
from gptjax.data.image_messages import pictures_of
from gptjax.data.packing import pack_documents
from gptjax.data.preferences import preference_of
from gptjax.data.prompts import prompt_of
from gptjax.tokenizer import BytesTokenizer

LENGTH = 24


def conversations(count: int = 200, seed: int = 0):
    """Conversations of numbered ids: question tokens are 1000 k + i, answers 1000 k + 500 + i."""
    rng, made = np.random.default_rng(seed), []
    for k in range(1, count + 1):
        q, a = rng.integers(1, 9), rng.integers(1, 12)
        made.append(([1000 * k + i for i in range(q)] + [1000 * k + 500 + i for i in range(a)], [0] * q + [1] * a))
    return made


def whole(batch):
    """(ids, weights of the targets) of each conversation in a batch, by its number."""
    found = []
    for row in range(len(batch["inputs_BL"])):
        for segment in range(1, batch["segments_BL"][row].max() + 1):
            here = batch["segments_BL"][row] == segment
            ids = [*batch["inputs_BL"][row][here], batch["targets_BL"][row][here][-1]]
            assert batch["positions_BL"][row][here].tolist() == list(range(here.sum()))
            found.append((ids, batch["weights_BL"][row][here].tolist()))
    return found


def test_every_conversation_is_whole_and_comes_once_an_epoch():
    given = conversations()
    rows = ConversationRows(given, LENGTH)
    found = whole(rows.batch(0, rows.num_rows))
    assert sorted(ids for ids, _ in found) == sorted(ids for ids, _ in given)
    weights = {ids[0]: weights for ids, weights in given}
    assert all(w == weights[ids[0]][1:] for ids, w in found), "the assistant's tokens count, and no others"
    again = whole(rows.batch(rows.num_rows, rows.num_rows))
    assert sorted(found) == sorted(again) and found != again, "in another order the next time"


def test_what_does_not_fit_or_has_no_answer_is_left_out_and_counted():
    given = [(list(range(25)), [0] * 20 + [1] * 5), (list(range(26)), [0] + [1] * 25), ([1, 2, 3], [0] * 3)]
    rows = ConversationRows(given, LENGTH)
    assert (rows.num_rows, rows.too_long, rows.unanswered) == (1, 1, 1)
    assert rows.batch(0, 1)["weights_BL"].sum() == 5
    with pytest.raises(
        InputError, match=r"none of 2 conversations .* 1 have more than data.length \+ 1 = 25 tokens, 1"
    ):
        ConversationRows(given[1:], LENGTH)


def test_best_fit_leaves_little_room():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, LENGTH + 1, 500).tolist()
    rows = pack_best_fit(sizes, LENGTH)
    assert sorted(itertools.chain(*rows)) == list(range(500))
    assert max(sum(sizes[i] for i in row) for row in rows) <= LENGTH
    halves = sum(size > LENGTH / 2 for size in sizes)  # no two of them share a row
    assert len(rows) <= 1.05 * max(halves, sum(sizes) / LENGTH)
    first_fit = pack_documents([[0] * (size + 1) for size in sizes], LENGTH)["inputs_BL"]
    assert len(rows) < len(first_fit)
    assert pack_best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_batches_go_on_where_they_were_and_do_not_depend_on_their_size():
    rows = ConversationRows(conversations(), LENGTH, seed=3)
    four = list(itertools.islice(rows.batches(4), 60))  # more than an epoch
    assert rows.num_rows < 240 and four[9][1] == {"rows": 40}
    for (a, place), (b, other) in zip(four[5:], rows.batches(4, step=5)):
        assert place == other
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    two = list(itertools.islice(rows.batches(2), 2))
    np.testing.assert_array_equal(np.concatenate([b["inputs_BL"] for b, _ in two]), four[0][0]["inputs_BL"])


def test_records_in_the_forms_of_hugging_face_are_read(tmp_path):
    said = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]
    records = [
        {"messages": said, "topic": "x"},
        {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b."}]},
        {"prompt": "a?", "completion": "b."},
    ]
    path = tmp_path / "chat.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    assert list(read_conversations(path)) == [said] * 3


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "a", "id": 3}, "has the fields text, id; wanted messages, conversations, or prompt and completion"),
        ({"messages": [{"role": "robot", "content": "a"}]}, r'messages\[0\] is .*; wanted {"role": one of human'),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] is"),
        ({"prompt": "a"}, "has a prompt and no completion"),
        (["a"], "has \\['a'\\]; wanted messages"),
    ],
)
def test_a_record_of_another_form_is_one_line(record, said):
    with pytest.raises(InputError, match=f"chat.jsonl:3:? ?{said}") as e:
        messages_of(record, "chat.jsonl:3")
    assert "\n" not in str(e.value)


PNG = b"\x89PNG\r\n\x1a\n" + b"of a picture nothing is looked at here"
AT = {"type": "image"}


def of(record, folder=None):
    """The messages of a record, each image as its bytes."""
    messages = messages_of(record, "chat.jsonl:3", folder)
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [part.get("text", part.get("image")) for part in message["content"]]
            message["content"] = [x if isinstance(x, str) else x.content for x in message["content"]]
    return [message["content"] for message in messages]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(PNG + b"b")
    return tmp_path


def test_images_are_read_in_every_form_that_openai_and_hugging_face_have(folder):
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    user = lambda content: [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]  # noqa: E731
    text = {"type": "text", "text": "a?"}
    same = [
        {"messages": user([{"type": "image_url", "image_url": {"url": url}}, text])},
        {"messages": user([{"type": "image_url", "image_url": {"url": "below/a.png"}}, text])},
        {"messages": user([{"type": "image", "image": "below/a.png", "text": None}, text | {"image": None}])},
        {"messages": user([{"type": "image", "image": {"bytes": PNG, "path": "elsewhere.png"}}, text])},
        {"messages": user([AT, text]), "images": [{"bytes": PNG, "path": None}]},
        {"messages": user([AT, text]), "image": {"bytes": None, "path": "below/a.png"}},
        {"messages": user("<image>a?"), "images": ["below/a.png"]},
        {"messages": user("a?"), "images": ["below/a.png"]},
        {"conversations": [{"from": "human", "value": "<image>a?"}, {"from": "gpt", "value": "x"}], "image": url},
        {"image": "below/a.png", "question": "a?", "answer": "x"},
        {"image": PNG, "prompt": "a?", "completion": "x"},
        {"file_name": "below/a.png", "prompt": "<image>a?", "completion": "x"},
    ]
    for record in same:
        assert of(record, folder) == [[PNG, "a?"], "x"], record
    two = {"messages": user([text, AT, {"type": "text", "text": "b"}, AT]), "images": ["b.png", PNG]}
    assert of(two, folder) == [["a?", PNG + b"b", "b", PNG], "x"]
    assert of({"messages": user("see <image> and <image>."), "images": [PNG, "b.png"]}, folder)[0] == [
        "see ", PNG, " and ", PNG + b"b", ".",
    ]  # fmt: skip
    assert of({"messages": user("<image>")}) == ["<image>", "x"], "a text alone spells none"
    assert of({"messages": user([text, text])}) == ["a?a?", "x"], "parts without an image are a text"
    assert of({"file_name": "a.py", "prompt": "a?", "completion": "<image>"}) == ["a?", "<image>"]
    (first,), (second,) = (
        pictures_of(messages_of(x, "chat.jsonl:3", folder)) for x in (same[0], {"image": "b.png", **same[9]})
    )
    assert first.key == second.key and second.origin == "chat.jsonl:3: image 1 (below/a.png)"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("../a.png", "without .."),
        ("/etc/passwd", "wanted one below"),
        ("below/../../a.png", "without .."),
        ("nope.png", "can't be read"),
        ("below", "is no file"),
        ("link.png", "a link that leads out of"),
        ("linked/secret.png", "a link that leads out of"),
        ("circle.png", "can't be read"),
        ("https://example.org/a.png", "nothing is fetched"),
        ("file:///etc/passwd", "nothing is fetched"),
        ("FILE:b.png", "nothing is fetched"),
        ("a\0.png", "wanted one below"),
        ("", "wanted one below"),
        ("data:text/html;base64,AAAA", "wanted image/png"),
        ("x" * 5000, "can't be read"),
        (3, "image 1 is 3; wanted a file below"),
        ({"bytes": None, "path": None}, "image 1 is None"),
    ],
)
def test_an_image_that_is_no_file_of_the_folder_is_one_line(folder, given, said):
    inside, outside = folder / "inside", folder / "secret.png"
    inside.mkdir()
    (inside / "below").mkdir()
    outside.write_bytes(PNG)
    (inside / "link.png").symlink_to(outside)
    (inside / "linked").symlink_to(folder)
    (inside / "circle.png").symlink_to(inside / "circle.png")
    with pytest.raises(InputError, match=r"^chat.jsonl:3: image 1") as e:
        messages_of({"image": given, "question": "a?", "answer": "x"}, "chat.jsonl:3", inside)
    assert said in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 600
    with pytest.raises(InputError, match=r"^chat.jsonl:3: messages\[0\]: part 1"):
        part = {"type": "image", "image": given} if given else {"type": "image_url", "image_url": given}
        messages_of({"messages": [{"role": "user", "content": [part]}]}, "chat.jsonl:3", inside)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": [AT, AT], "images": [PNG]}, r"has 1 image and 2 places for them, .*; wanted as many"),
        ({"messages": [AT], "images": [PNG, PNG]}, r"has 2 images and 1 places"),
        ({"messages": [AT]}, r"has 0 images and 1 places"),
        ({"messages": [AT], "images": []}, r"has 0 images and 1 places"),
        ({"messages": "<image><image>", "images": [PNG]}, r"has 1 image and 2 places"),
        ({"messages": [{"type": "video"}]}, r"messages\[0\]: part 1 is .*; wanted \{\"type\": \"text\""),
        ({"messages": ["a"]}, r"messages\[0\]: part 1 is 'a'"),
        ({"messages": [AT], "images": "b.png"}, r"image 1 is the path 'b.png'; wanted a data: URL here"),
        ({"question": "a?", "image": PNG}, "has a question and no answer"),
    ],
)
def test_images_and_their_places_are_as_many_and_parts_are_known(record, said):
    if "messages" in record:
        record = record | {"messages": [{"role": "user", "content": record["messages"]}]}
    with pytest.raises(InputError, match=rf"^chat.jsonl:3:? ?{said}") as e:
        messages_of(record, "chat.jsonl:3")
    assert "\n" not in str(e.value)


def test_only_the_user_shows_images_and_only_conversations_have_them():
    for role in ("system", "assistant"):
        record = {"messages": [{"role": role, "content": [AT]}], "images": [PNG]}
        with pytest.raises(InputError, match=f"of the role {role} and holds an image"):
            messages_of(record, "chat.jsonl:3")
    with pytest.raises(InputError, match="chat.jsonl:3 holds an image; wanted texts"):
        preference_of({"prompt": "a", "chosen": "b", "rejected": "c", "images": [PNG]}, "chat.jsonl:3")
    asked = [{"role": "user", "content": [{"type": "image", "image": PNG}]}]
    with pytest.raises(InputError, match="chat.jsonl:3 holds an image; wanted texts"):
        prompt_of({"prompt": asked}, "chat.jsonl:3", BytesTokenizer())
