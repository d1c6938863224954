"""Text to ids and back, the model's own chat template, and the ids that end an answer.

The ids come from `tokenizer.json` as the tokenizers library reads it. Conversations are rendered by the Jinja
template that comes with the model, in a sandbox, since it is code from a download. Nothing is added here: no
default system prompt, no BOS.

A conversation with the model only ever appends ids: `chat` takes the ids of a Reply that a message carries
(see `Reply.message` in episode.py) as they were sampled, and tokenizes only the text that came after.
"""

import json
import os
import shutil
import sys
from datetime import datetime
from functools import cached_property
from pathlib import Path

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slm import BadInput
from slm.runs.files import read_json

ENDS = ("<|im_end|>", "<|endoftext|>")  # Qwen: a chat turn ends with the first, a document with the second
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
         "vocab.json", "merges.txt", "added_tokens.json")


class Tokenizer:
    """stop_ids: the ids that end an answer. directory: where it was loaded from, with the model's configs."""

    def __init__(self, directory: Path, backend: tokenizers.Tokenizer, config: dict, template: str | None,
                 stop_ids: frozenset[int]):
        self.directory, self.backend, self.config, self.stop_ids = directory, backend, config, stop_ids
        self.template = template
        self._warned = False

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
        template, file = config.get("chat_template"), directory / "chat_template.jinja"
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        if file.is_file():
            template = file.read_text(encoding="utf-8")
        return cls(directory, backend, config, template, _stop_ids(directory, backend, config))

    def save(self, directory: str | Path) -> None:
        """Copy the tokenizer's files, as they were loaded, into an existing directory."""
        for name in FILES:
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, os.path.join(directory, name))

    # ---- text and ids ----

    def encode(self, text: str) -> list[int]:
        """Ids of the text. Special tokens written out in it become their ids; none are added."""
        return self.backend.encode(text, add_special_tokens=False).ids

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
            return self._template(messages[:-1], True) + messages[-1]["content"]
        return self._template(messages, generation)

    def chat(self, messages: list[dict], generation: bool = True) -> list[int]:
        """Ids of the conversation. Where a message carries the Reply it came from, and everything before is
        what that reply was sampled after, its ids are kept and only what follows is tokenized."""
        text = self.render(messages, generation)
        for message in reversed(messages):
            if getattr(message.get("reply"), "ids", None):  # an Endpoint's replies have none
                if (ids := self._continue(message["reply"], text)) is not None:
                    return ids
                self._warn_once()
                break
        return self.encode(text)

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
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        tail = self.encode(self.render(talk, generation=False)[len(self.render(talk)):])
        if not tail or tail[0] not in self.stop_ids:
            raise BadInput(f"{self.directory}: the chat template does not close an answer with a stop token")
        return tail[0]

    def _continue(self, reply, text: str) -> list[int] | None:
        """The reply's ids and those of the rest of the text, or None if the text does not continue it."""
        ids = reply.prompt_ids + reply.ids
        closed = ids[-1] in self.stop_ids
        so_far = self.decode(ids[:-1] if closed else ids, skip_special=False)
        if not text.startswith(so_far):
            return None
        rest = text[len(so_far):]
        if closed:  # the model closed its turn itself
            ends = [end for end in self.stop_texts if rest.startswith(end)]
            if not ends:
                return ids[:-1] + self.encode(rest)
            rest = rest[len(max(ends, key=len)):]
        return ids + self.encode(rest)

    @cached_property
    def stop_texts(self) -> list[str]:
        return [token for token in map(self.backend.id_to_token, self.stop_ids) if token]

    def _warn_once(self) -> None:
        if not self._warned:
            why = "a message was edited" if self.appends else "its chat template rewrites earlier turns"
            print(f"note: {self.directory.name}: {why}; it is tokenized anew from its text", file=sys.stderr)
        self._warned = True

    def _template(self, messages: list[dict], generation: bool) -> str:
        if self.template is None:
            raise BadInput(f"{self.directory}: no chat template, expected chat_template.jinja or the key "
                           "chat_template in tokenizer_config.json")
        messages = [{k: v for k, v in m.items() if k != "reply"} for m in messages]
        try:
            return self._compiled.render(messages=messages, tools=None, documents=None,
                                         add_generation_prompt=generation, **self._named)
        except jinja2.TemplateError as e:
            raise BadInput(f"{self.directory}: the chat template refuses these messages: {e}") from None

    @cached_property
    def _compiled(self) -> jinja2.Template:
        """Compiled with the settings that every published template assumes (those of transformers)."""
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])

        def tojson(value, ensure_ascii=False, **kwargs):
            return json.dumps(value, ensure_ascii=ensure_ascii, **kwargs)

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        env.filters["tojson"] = tojson
        env.globals["raise_exception"] = raise_exception
        env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return env.from_string(self.template)
        except jinja2.TemplateError as e:
            raise BadInput(f"{self.directory}: the chat template is not valid Jinja: {e}") from None

    @cached_property
    def _named(self) -> dict:
        """bos_token, eos_token, ... for the template."""
        tokens = {k: v["content"] if isinstance(v, dict) else v for k, v in self.config.items()
                  if k.endswith("_token")}
        return {k: v for k, v in tokens.items() if isinstance(v, str)}


def _stop_ids(directory: Path, backend: tokenizers.Tokenizer, config: dict) -> frozenset[int]:
    """What the model's files declare as its end, and Qwen's two end tokens where the vocabulary has them: a
    base model declares only one of them, and meets both as soon as it is trained on chats."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        declared = read_json(directory / name, {}).get("eos_token_id")
        ids.update(declared if isinstance(declared, list) else [] if declared is None else [declared])
    eos = config.get("eos_token")
    names = (eos["content"] if isinstance(eos, dict) else eos, *ENDS)
    ids.update(i for i in (backend.token_to_id(name) for name in names if name) if i is not None)
    return frozenset(ids)
