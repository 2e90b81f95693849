"""Laws of a tokenizer's conventions: how prompts begin, what ends a text, and the template of chats, by its files."""

import json

import pytest
from awkward_texts import sentencepiece_model

from gptjax.cli import main
from gptjax.config.section import InputError
from gptjax.tokenizer import SentencePieceTokenizer, load_tokenizer, open_tokenizer
from gptjax.tokenizer.conventions import set_conventions

pytest.importorskip("tokenizers", reason="needs the extra gptjax[bpe]")

from byte_pairs import END, TWO_FILES, VOCAB, byte_level_json  # noqa: E402 : after what it needs was looked for

PLAIN = byte_level_json(post_processor=None)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write(folder, **files) -> None:
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("config", "tokenizer", "begins"),
    [
        ({"add_bos_token": True}, PLAIN, True),  # as Llama 2 has it
        ({"add_bos_token": False}, byte_level_json(), False),
        ({}, byte_level_json(), True),  # as Llama 3 has it: tokenizer.json alone adds it
        (
            {},
            byte_level_json(post_processor={"type": "Sequence", "processors": [byte_level_json()["post_processor"]]}),
            True,
        ),
        ({}, byte_level_json(post_processor={"type": "ByteLevel"}), False),  # as GPT-2 has it
        ({"add_bos_token": None}, PLAIN, False),
    ],
)
def test_a_prompt_begins_as_the_files_say(tmp_path, config, tokenizer, begins):
    write(tmp_path, tokenizer_config=config, tokenizer=tokenizer)
    made = open_tokenizer(tmp_path)
    set_conventions(made, tmp_path)
    assert made.begins == begins and (made.prompt_ids("a")[0] == made.bos_id) == begins
    made.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").begins == begins


def test_where_no_file_says_it_sentencepiece_begins_a_prompt_and_gpt2s_files_do_not(tmp_path):
    for name, content in TWO_FILES.items():
        (tmp_path / name).write_bytes(content)
    made = open_tokenizer(tmp_path)
    set_conventions(made, tmp_path)
    assert not made.begins and made.stop_ids == () and made.template == ""
    made = SentencePieceTokenizer(sentencepiece_model())
    set_conventions(made, tmp_path)
    assert made.begins


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        ({"generation_config": {"eos_token_id": [VOCAB[END], 7, 10**6, "x"]}}, (7,)),
        ({"generation_config": {"eos_token_id": 9}, "config": {"eos_token_id": 8}}, (9,)),
        ({"generation_config": {}, "config": {"eos_token_id": [8, 9, 8]}}, (8, 9)),
        ({"config": {"text_config": {"eos_token_id": 6}}}, (6,)),
        ({"config": {"text_config": None}}, ()),
    ],
)
def test_a_text_ends_as_the_files_say(tmp_path, files, stops):
    write(tmp_path, tokenizer=PLAIN, **files)
    made = open_tokenizer(tmp_path)
    set_conventions(made, tmp_path)
    assert made.stop_ids == stops


def chat_tokens(*names) -> dict:
    size = max(t["id"] for t in PLAIN["added_tokens"]) + 1
    added = [{"id": size + i, "content": name, "special": True} for i, name in enumerate(names)]
    return PLAIN | {"added_tokens": [t for t in PLAIN["added_tokens"] if t["content"] not in names] + added}


@pytest.mark.parametrize(
    ("jinja", "tokens", "template"),
    [
        (CHATML, ("<|im_start|>", "<|im_end|>"), "chatml"),
        ([{"name": "tool_use", "template": ""}, {"name": "default", "template": f"\n{CHATML} "}],
         ("<|im_start|>", "<|im_end|>"), "chatml"),
        (CHATML, ("<|im_start|>",), ""),  # it lacks a token of it
        (CHATML + "!", ("<|im_start|>", "<|im_end|>"), ""),
        (7, ("<|im_start|>", "<|im_end|>"), ""),
    ],
)  # fmt: skip
def test_the_template_is_known_by_its_text(tmp_path, jinja, tokens, template):
    write(tmp_path, tokenizer=chat_tokens(*tokens), tokenizer_config={"chat_template": jinja})
    made = open_tokenizer(tmp_path)
    set_conventions(made, tmp_path)
    assert made.template == template
    made.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").template == template
    if isinstance(jinja, str):
        write(tmp_path, tokenizer_config={})
        (tmp_path / "chat_template.jinja").write_text(jinja + "\n")
        made.template = ""
        set_conventions(made, tmp_path)
        assert made.template == template


def test_a_template_that_was_saved_is_checked_when_it_is_loaded(tmp_path):
    made = open_tokenizer_of(tmp_path)
    made.save(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer_meta.json"
    for name, says in (("chattml", "no chat template 'chattml'"), ("chatml", "needs the special token '<|im_end|>'")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"template": name}))
        with pytest.raises(InputError, match=says.replace("|", "\\|")):
            load_tokenizer(tmp_path / "saved")


@pytest.mark.slow
def test_a_run_of_ones_own_keeps_the_template_that_its_settings_name(tmp_path, capsys):
    flags = ["--steps", "1", "--model.num-layers", "1", "--model.width", "32", "--model.num-heads", "2"]
    flags += ["--data.batch-size", "8", "--data.length", "32", "--evaluate.max-rows", "8", "--tokenizer.kind", "bytes"]
    flags += ["--tokenizer.vocab-size", "258", "--tokenizer.template"]
    assert main(["pretrain", "quickstart", "--run-dir", str(tmp_path / "run"), *flags, "llama2"]) == 0
    assert load_tokenizer(tmp_path / "run" / "tokenizer").template == "llama2"
    assert main(["pretrain", "quickstart", "--run-dir", str(tmp_path / "other"), *flags, "chatml"]) == 2
    assert "the template chatml needs the special token '<|im_start|>'" in capsys.readouterr().err


def open_tokenizer_of(folder):
    write(folder, tokenizer=chat_tokens("<|im_start|>"))
    return open_tokenizer(folder)
