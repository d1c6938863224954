"""Text to ids and back, the model's own chat template, and the ids that end an answer.

The tokenizers library reads `tokenizer.json` and gives the ids. The Jinja template that comes with the model
writes conversations as text. The template is code from a download, so it runs in a sandbox. Nothing is added
here: no default system prompt, no BOS.

A conversation only ever appends ids. If a message carries its Reply (`Reply.message` in episode.py), `chat`
keeps the ids that were sampled and tokenizes only the text after them.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import time
from functools import cached_property, partial
from pathlib import Path

import jinja2
import tokenizers
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slm import BadInput
from slm.runs.files import read_json

ENDS = ("<|im_end|>", "<|endoftext|>")  # Qwen: a chat turn ends with the first, a document with the second
PLAIN = (  # for a model without a chat template
    "{% for m in messages %}{{ 'Answer:\\n' if m.role == 'assistant' }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n"
    "{% endfor %}{% if add_generation_prompt %}Answer:\n{% endif %}")
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
         "vocab.json", "merges.txt", "added_tokens.json")


class Tokenizer:
    """directory: the folder of the model that it was loaded from. named: bos_token, eos_token, ... -> text.
    template: the model's chat template, or PLAIN if it has none (a base model): the question, then "Answer:".
    stop_ids: the ids that end an answer."""

    def __init__(self, directory: Path, backend: tokenizers.Tokenizer, named: dict[str, str],
                 template: str | None, stop_ids: frozenset[int]):
        self.directory, self.backend, self.named = directory, backend, named
        self.template, self.stop_ids, self._warned = template or PLAIN, stop_ids, False
        self._roles: set[str] = set()  # those that the template is known to write
        if not template:
            print(f"note: {directory} has no chat template; prompts are plain: the question, then 'Answer:'",
                  file=sys.stderr)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read a Hugging Face directory. BadInput if it holds no readable tokenizer.json."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise BadInput(f"{directory}: no tokenizer.json, expected one beside the weights")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises plain Exception
            raise BadInput(f"{path}: not a tokenizer file ({e})") from None
        backend.no_padding()
        backend.no_truncation()
        config = read_json(directory / "tokenizer_config.json", {})
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        if (directory / "chat_template.jinja").is_file():
            template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        named = {}
        for name, token in config.items():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(text, str):
                named[name] = text
        return cls(directory, backend, named, template, _stop_ids(directory, backend, named.get("eos_token")))

    def save(self, directory: str | Path) -> None:
        """Copy the tokenizer's files, as they were loaded, into an existing directory. PLAIN becomes the
        model's own template: what is trained with it is asked with it."""
        if self.template == PLAIN:
            Path(directory, "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
        for name in FILES:
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, os.path.join(directory, name))

    # ---- text and ids ----

    def encode(self, text: str) -> list[int]:
        """Ids of the text. Special tokens written out in it become their ids; none are added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def following(self, text: str, before: str = "\n") -> list[int]:
        """Ids of a text that goes on behind another. A tokenizer like Llama 2's puts a space before a text,
        so it gets both, and the ids of `before` are cut off."""
        if len(self.encode("\n")) == 1:
            return self.encode(text)
        return self.encode(before + text)[len(self.encode(before)):]

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Text of the ids. Bytes that are no UTF-8 (an answer cut inside a character) become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    @cached_property
    def largest(self) -> int:
        """The largest id. A model's embedding may have more rows than this."""
        return max(self.backend.get_vocab(with_added_tokens=True).values())

    # ---- conversations ----

    def render(self, messages: list[dict], generation: bool = True) -> str:
        """The conversation as the model's template writes it.

        generation: up to where the assistant's next words go. If the last message is the assistant's own, the
        text ends inside that turn, so the model continues it. Without generation every turn is closed.
        """
        if generation and messages and messages[-1]["role"] == "assistant":
            return self._template(messages[:-1], True) + self.after_prompt(messages[-1]["content"])
        return self._template(messages, generation)

    def after_prompt(self, content: str) -> str:
        """An assistant's text as it follows the generation prompt. Some templates (DeepSeek-R1, QwQ) open
        <think> there, so a text that opens it too goes on behind its own tag."""
        return re.sub(r"\A\s*<think>\s*", "", content) if self.opens_thinking else content

    @cached_property
    def opens_thinking(self) -> bool:
        return self.render([{"role": "user", "content": "a"}]).rstrip().endswith("<think>")

    def chat(self, messages: list[dict], generation: bool = True) -> list[int]:
        """Ids of the conversation. If a message carries its Reply, and the text before it is still the prompt
        of that reply, then the reply's ids are kept and only what follows is tokenized."""
        text = self.render(messages, generation)
        replies = [n for n, m in enumerate(messages, 1) if "reply" in m and m["reply"].ids]  # no server's
        ids = self._continue(messages[:replies[-1]], text) if replies else None
        if replies and ids is None and not self._warned:
            self._warned = True
            why = "a message was edited" if self.appends else "its chat template rewrites earlier turns"
            print(f"note: {self.directory.name}: {why}; it is tokenized anew from its text", file=sys.stderr)
        return self.encode(text) if ids is None else ids

    @cached_property
    def appends(self) -> bool:
        """Whether a longer conversation renders as the shorter one plus text. Some templates rewrite old
        turns, such as those that drop the thinking in them."""
        talk = [{"role": "user", "content": "a"}, {"role": "user", "content": "c"}]
        talk.insert(1, {"role": "assistant", "content": "<think>\nb\n</think>\n\nb "})
        return self.render(talk).startswith(self.render(talk[:2]))

    @cached_property
    def end_of_turn(self) -> int:
        """The id with which the template closes an assistant's turn: the last of every answer trained on."""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the answer"}]
        tail = self.encode(self.render(talk, generation=False).rpartition("the answer")[2])
        if not tail or tail[0] not in self.stop_ids:
            raise BadInput(f"{self.directory}: the chat template does not close an answer with a stop token")
        return tail[0]

    def _continue(self, messages: list[dict], text: str) -> list[int] | None:
        """The ids of the last message's reply and those of the rest of the text, or None if the text does not
        continue it."""
        *earlier, last = messages
        ids = last["reply"].prompt_ids + last["reply"].ids
        closed = ids[-1] in self.stop_ids
        own = ids[:-1] if closed else ids
        so_far = self.decode(own, skip_special=False)
        if not text.startswith(so_far):  # Llama 2's decoder shows spaces that the prompt does not have
            start = self.chat(earlier)
            so_far = self.render(earlier) + self.decode(own[len(start):], skip_special=False)
            if own[:len(start)] != start or not text.startswith(so_far):
                return None
        rest = text[len(so_far):]
        if closed:  # the model closed its turn itself
            ends = [end for end in self.stop_texts if rest.startswith(end)]
            if ends:
                end = max(ends, key=len)
                return ids + self.following(rest[len(end):], end)
        return own + self.following(rest)

    @cached_property
    def stop_texts(self) -> list[str]:
        return [token for token in map(self.backend.id_to_token, self.stop_ids) if token]

    def _template(self, messages: list[dict], generation: bool) -> str:
        messages = [dict(message) for message in messages]
        for message in messages:
            message.pop("reply", None)
        try:
            self._refuse_roles({message["role"] for message in messages} - self._roles)
            return self._jinja(messages, generation)
        except jinja2.TemplateError as e:
            raise BadInput(f"{self.directory}: the chat template refuses these messages: {e}") from None

    def _jinja(self, messages: list[dict], generation: bool) -> str:
        return self._compiled.render(messages=messages, tools=None, documents=None,
                                     add_generation_prompt=generation, **{"eos_token": "", **self.named})

    def _refuse_roles(self, roles: set[str]) -> None:
        """BadInput for a role whose messages the template leaves out without a word. (One that raises an
        error speaks for itself.)"""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        for role in roles:
            for before in ([], talk[:1], talk):
                with contextlib.suppress(jinja2.TemplateError):
                    if "the words" in self._jinja([*before, {"role": role, "content": "the words"}], False):
                        break
            else:
                self._jinja([{"role": role, "content": "the words"}], False)
                raise BadInput(f"{self.directory}: the chat template leaves out messages of the role "
                               f"{role!r}; expected one that it writes, such as user or assistant")
            self._roles.add(role)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        """Compiled with the settings that every published template assumes (those of transformers)."""
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=[loopcontrols, Generation])

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        env.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
        try:
            return env.from_string(self.template)
        except jinja2.TemplateError as e:
            raise BadInput(f"{self.directory}: the chat template is not valid Jinja: {e}") from None


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, with which templates for transformers mark what an assistant
    wrote. Here it changes nothing."""
    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _stop_ids(directory: Path, backend: tokenizers.Tokenizer, eos: str | None) -> frozenset[int]:
    """The ends that the model's files declare, and Qwen's two end tokens if the vocabulary has them: a base
    model declares only one of the two, and meets both as soon as it is trained on chats."""
    ids: list[int | None] = []
    for name in ("generation_config.json", "config.json"):
        declared = read_json(directory / name, {}).get("eos_token_id")
        ids += declared if isinstance(declared, list) else [declared]
    ids += [backend.token_to_id(text) for text in (eos, *ENDS) if text]
    return frozenset(ids) - {None}
