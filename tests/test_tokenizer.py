"""tokenizer.py: the template, the stop ids, and conversations that only append."""

import json
import shutil

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

import train_sft
from slm import BadInput
from slm.checkpoint import TINY
from slm.episode import Reply
from slm.tokenizer import Tokenizer

ASK = [{"role": "user", "content": "What is 2 + 3?"}]
AGAIN = {"role": "user", "content": "And times 4?"}


@pytest.fixture
def tok():
    return Tokenizer.load(TINY)


@pytest.fixture
def with_template(tmp_path):
    """with_template(text) -> the built-in tokenizer with another chat template."""
    def build(template: str) -> Tokenizer:
        for path in TINY.glob("*.json"):
            shutil.copy(path, tmp_path)
        (tmp_path / "chat_template.jinja").write_text(template)
        return Tokenizer.load(tmp_path)
    return build


def reply(tok, messages, text, end="<|im_end|>"):
    ids = tok.encode(text)
    # One token a character at the front: sampled ids need not be how the tokenizer would cut the text.
    ids = [i for c in text[:3] for i in tok.encode(c)] + tok.encode(text[3:]) + tok.encode(end)
    return Reply(text, ids, [0.0] * len(ids), prompt_ids=tok.chat(messages))


def test_text_survives_encoding(tok):
    for text in ("", "12 apples cost $3.50.", "héllo\n\n\tdef f(x): return x\n", "中文 🙂 \u200b", "a" * 500):
        assert tok.decode(tok.encode(text)) == text


def test_special_tokens_are_one_id_and_can_be_left_out(tok):
    ids = tok.encode("<|im_start|>hi<|im_end|>")
    assert tok.decode(ids) == "hi" and tok.decode(ids, skip_special=False) == "<|im_start|>hi<|im_end|>"


def test_the_stop_ids_are_both_ends_whatever_the_config_declares(tok, with_template):
    named = {tok.backend.token_to_id("<|im_end|>"), tok.backend.token_to_id("<|endoftext|>")}
    assert tok.stop_ids == named
    other = with_template(tok.template)
    (other.directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert Tokenizer.load(other.directory).stop_ids == named | {7}


def test_the_last_trained_token_is_what_the_template_closes_with(tok):
    assert tok.decode([tok.end_of_turn], skip_special=False) == "<|im_end|>"


def test_a_trailing_answer_is_continued_and_not_closed(tok):
    messages = [*ASK, {"role": "assistant", "content": "It is"}]
    assert tok.render(messages) == tok.render(ASK) + "It is"
    assert "<|im_end|>" in tok.render(messages, generation=False)[len(tok.render(messages)):]


def test_appending_a_turn_keeps_the_sampled_ids(tok):
    first = reply(tok, ASK, "The answer is 5.")
    ids = tok.chat([*ASK, first.message(), AGAIN])
    assert ids[:len(first.prompt_ids + first.ids)] == first.prompt_ids + first.ids
    assert tok.decode(ids, skip_special=False) == tok.render([*ASK, first.message(), AGAIN])
    assert ids != tok.chat([*ASK, {"role": "assistant", "content": first.text}, AGAIN])  # not re-tokenized


def test_appended_ids_are_those_of_the_whole_where_the_answer_is_cut_as_usual(tok):
    ids = tok.encode("The answer is 5.")
    first = Reply("The answer is 5.", [*ids, tok.end_of_turn], prompt_ids=tok.chat(ASK))
    text = {"role": "assistant", "content": first.text}
    assert tok.chat([*ASK, first.message(), AGAIN]) == tok.chat([*ASK, text, AGAIN])


@pytest.mark.parametrize("end", ["", "<|endoftext|>"])
def test_an_answer_that_was_cut_or_ended_otherwise_still_appends(tok, end):
    first = reply(tok, ASK, "The answer is 5.", end)
    ids = tok.chat([*ASK, first.message(), AGAIN])
    assert ids[:len(first.prompt_ids + first.ids)] == first.prompt_ids + first.ids
    tail = tok.decode(ids[len(first.prompt_ids + first.ids):], skip_special=False)
    assert tail.startswith("\n" if end else "<|im_end|>\n") and "And times 4?" in tail


def test_text_put_into_a_turn_appends_to_the_sampled_ids(tok):
    """Code output goes inside the assistant's turn; so does what is sampled after it."""
    first = reply(tok, ASK, "Run print(2+3)\n", end="")
    message = first.message() | {"content": first.text + "Output: 5\n"}
    ids = tok.chat([*ASK, message])
    assert ids[:len(first.prompt_ids + first.ids)] == first.prompt_ids + first.ids
    assert tok.decode(ids, skip_special=False).endswith("print(2+3)\nOutput: 5\n")
    second = Reply("So 5.", tok.encode("So 5.") + [tok.end_of_turn], prompt_ids=ids)
    message = second.message() | {"content": first.text + "Output: 5\nSo 5."}
    again = tok.chat([*ASK, message, AGAIN])
    assert again[:len(ids + second.ids)] == ids + second.ids


ZEPHYR = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content + eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


@pytest.fixture(params=["Llama 2", "Llama 2, not legacy"])
def llama(tmp_path, request):
    """A tokenizer like Llama 2's: pieces of sentencepiece, bytes for what has none, and a space put before a
    text: by older files before each part between special tokens, by newer ones before the first."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "\u2581",
              *(chr(n) for n in range(33, 127)), "Ye", "Yes", "\u2581Yes"]
    merges = [("Y", "e"), ("Ye", "s"), ("\u2581", "Yes")]
    t = Backend(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, unk_token="<unk>",
                           fuse_unk=True, byte_fallback=True))
    if request.param == "Llama 2":
        t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                             normalizers.Replace(" ", "\u2581")])
    else:
        t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    t.add_special_tokens(["<s>", "</s>"])
    t.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "</s>", "chat_template": ZEPHYR}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(tmp_path)


def test_a_tokenizer_that_puts_a_space_before_each_text_keeps_the_sampled_ids_too(llama, capsys):
    """All ids are those that the whole text has, so nothing was added where two parts meet."""
    whole = lambda talk: llama.backend.encode(llama.render(talk), add_special_tokens=False).ids
    spelt = [llama.backend.token_to_id(c) for c in "Yes."]
    first = Reply("Yes.", [*spelt, 2], prompt_ids=llama.chat(ASK))
    talk = [*ASK, first.message(), AGAIN]
    ids = llama.chat(talk)
    assert ids[:len(first.prompt_ids) + 5] == first.prompt_ids + first.ids and ids != whole(talk)
    assert ids[-20:] == whole(talk)[-20:]
    code = Reply("Yes: 2\n", whole([*ASK, {"role": "assistant", "content": "Yes: 2\n"}])[len(whole(ASK)):],
                 prompt_ids=llama.chat(ASK))
    talk = [*ASK, code.message("```output\n4\n```\n")]  # inside of the turn, and on from there
    assert llama.chat(talk) == whole(talk)
    more = Reply("Yes, 4.", [*llama.following("Yes, 4."), 2], prompt_ids=llama.chat(talk))
    talk = [*ASK, more.message() | {"content": talk[-1]["content"] + more.text}, AGAIN]
    assert llama.chat(talk) == whole(talk) and not capsys.readouterr().err


def test_a_conversation_of_such_a_tokenizer_is_trained_as_it_is_read(llama):
    talk = [*ASK, {"role": "assistant", "content": "Yes."}, AGAIN, {"role": "assistant", "content": "No."}]
    record = train_sft.encode(llama, talk)
    assert record.ids + llama.encode("</s>\n")[1:] == llama.encode(llama.render(talk, generation=False))
    trained = [i for i, m in zip(record.ids, record.mask) if m]
    assert [llama.backend.id_to_token(i) for i in trained] == ["Yes", ".", "</s>", "N", "o", ".", "</s>"]


def test_an_edited_conversation_is_rendered_from_its_text(tok, capsys):
    first = reply(tok, ASK, "The answer is 5.")
    edited = [{"role": "user", "content": "What is 2 + 4?"}, first.message(), AGAIN]
    assert tok.chat(edited) == tok.encode(tok.render(edited))
    assert "edited" in capsys.readouterr().err


def test_a_template_that_rewrites_old_turns_is_detected_and_said(tok, with_template, capsys):
    assert tok.appends
    forgetful = with_template("""{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""")
    assert not forgetful.appends
    first = reply(forgetful, ASK, "<think>2 and 3</think>5")
    talk = [*ASK, first.message(), AGAIN]
    assert forgetful.chat(talk) == forgetful.encode(forgetful.render(talk))
    assert "rewrites earlier turns" in capsys.readouterr().err


def test_the_template_runs_in_a_sandbox(with_template):
    for attack in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
                   "{{ cycler.__init__.__globals__.os.popen('id').read() }}"):
        with pytest.raises(BadInput, match="template"):
            with_template(attack).chat(ASK)


def test_a_template_that_refuses_or_is_broken_is_one_sentence(tok, with_template):
    with pytest.raises(BadInput, match="no tools here"):
        with_template("{{ raise_exception('no tools here') }}").chat(ASK)
    with pytest.raises(BadInput, match="not valid Jinja"):
        with_template("{% if %}").chat(ASK)



def test_saved_files_are_the_loaded_ones(tok, tmp_path):
    tok.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    assert Tokenizer.load(tmp_path).chat(ASK) == tok.chat(ASK)


# A model's template as published, shortened: it opens the thinking in the prompt and drops it from old turns.
R1 = ("{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>"
      "{% elif m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
      "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}")


def test_thinking_that_the_prompt_opens_is_not_opened_twice(with_template):
    tok = with_template(R1)
    assert tok.opens_thinking and tok.end_of_turn in tok.stop_ids
    answer = {"role": "assistant", "content": "<think>\nSo.\n</think>\nIt is 4."}
    record = train_sft.encode(tok, [*ASK, answer])
    text = tok.decode(record.ids, skip_special=False)
    assert text.count("<think>") == text.count("</think>") == 1 and text.endswith("It is 4.<|im_end|>")
    assert not with_template("{% for m in messages %}{{ m.content }}{% endfor %}").opens_thinking


def test_a_role_that_the_template_leaves_out_is_refused_by_name(with_template):
    tok = with_template(R1)
    with pytest.raises(BadInput, match="leaves out messages of the role 'system'"):
        tok.chat([{"role": "system", "content": "Be brief."}, *ASK])
    with pytest.raises(BadInput, match="refuses these messages: no tools"):
        with_template("{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
                      "{% endif %}{{ m.content }}{% endfor %}").chat([*ASK, {"role": "tool", "content": "4"}])


def test_what_transformers_adds_to_jinja_is_understood(with_template):
    tok = with_template("{% for m in messages %}{% generation %}{{ m.content | tojson(indent=1) }}"
                        "{% endgeneration %}{% endfor %}")
    assert tok.render([{"role": "user", "content": "é"}]) == '"é"'


def test_a_model_without_a_template_is_asked_in_plain_words_and_keeps_them(tok, tmp_path, capsys):
    folder = tmp_path / "base"
    folder.mkdir()
    tok.save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    base = Tokenizer.load(folder)
    assert "no chat template" in capsys.readouterr().err
    assert base.render(ASK) == ASK[-1]["content"] + "\nAnswer:\n"
    record = train_sft.encode(base, [*ASK, {"role": "assistant", "content": "4"}])
    assert base.decode(record.ids, skip_special=False) == base.render(ASK) + "4<|endoftext|>"
    assert base.decode([i for i, m in zip(record.ids, record.mask) if m]) == "4"
    (tmp_path / "again").mkdir()
    base.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").template == base.template and not capsys.readouterr().err
