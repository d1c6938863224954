"""The shapes of rows that people have: which field holds what. One table, for problems and for training.

    {"Body": "I have two hens.", "Question": "How many?", "Answer": 2}       a story and its question
    {"instruction": "Add.", "input": "1 and 1", "output": "That is 2."}      Alpaca
    {"prompt": "1 + 1?", "completion": "2"}                                  texts, or lists of messages
    {"conversations": [{"from": "human", "value": "1 + 1?"}, ...]}           ShareGPT; or messages

Names count in any case. Of several filled fields for one part, the first in the table is taken.
"""

from typing import Any, NamedTuple

from slm.episode import user

FIELDS = {
    "story": ("body", "story", "context", "passage", "paragraph", "scenario", "situation", "background"),
    "question": ("question", "problem", "query"),
    "prompt": ("instruction", "prompt"),
    "input": ("input",),
    "response": ("response", "completion", "output", "generated_solution"),
    "solution": ("solution", "rationale"),
    "gold": ("gold", "answer", "final_answer", "expected_answer", "ground_truth", "reward_model", "target"),
    "talk": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
         "assistant": "assistant", "system": "system"}


class Row(NamedTuple):
    """What a row holds, '' or [] where it lacks that; of question and gold None if it has no such field.
    gold: as it stands there. messages: a conversation to train on as it is; without one the standard prompt
    goes around the question. unread: the names of fields with several words that were not taken."""
    question: str | None
    response: str
    gold: Any
    solution: str
    messages: list
    unread: list[str]


def read(row: dict) -> Row:
    """A row of any shape. A conversation holds a question if its user speaks once."""
    low = {str(key).strip().lower().replace(" ", "_"): value for key, value in row.items()}
    name = {part: _first_filled(low, names) for part, names in FIELDS.items()}
    value = {part: low.get(key) for part, key in name.items()}
    text = {part: v if isinstance(v, str) else "" for part, v in value.items()}
    asked = text["question"] or "\n".join(filter(None, (text["prompt"], text["input"])))
    asked = f"{text['story']} {asked}" if asked and text["story"] not in asked else asked
    before = [{"role": "system", "content": text["system"]}] if text["system"] else []
    answer = [_message(turn) for turn in value["response"]] if isinstance(value["response"], list) else []
    answer = [{"role": "assistant", "content": text["response"]}] if text["response"] else answer
    if text["question"] and answer and not before:
        messages = []
    elif value["talk"] or isinstance(value["prompt"], list):  # of a prompt nothing is trained
        earlier = [] if value["talk"] else [_message(turn, weight=0) for turn in value["prompt"]]
        talk = value["talk"] if isinstance(value["talk"] or [], list) else [value["talk"]]
        messages = before + earlier + [_message(turn) for turn in talk or answer]
    else:
        messages = [*before, user(asked), *answer] if asked and answer else []
    spoken = [m for m in messages if isinstance(m, dict) and isinstance(m["content"], str)]
    asks = [m["content"] for m in spoken if m["role"] == "user"]
    told = [m["content"] for m in spoken if m["role"] == "assistant"]
    gold = value["gold"] if name["gold"] else "" if low.keys() & FIELDS["gold"] else None
    gold = gold.get("ground_truth", gold) if isinstance(gold, dict) else gold
    asked = asked or (asks[0] if len(asks) == 1 else "")
    there = low.keys() & {*FIELDS["question"], *FIELDS["prompt"], *FIELDS["talk"]}
    used = {key for part, key in name.items() if not (text["question"] and part in ("prompt", "input"))}
    unread = [key for key, v in low.items() if " " in str(v) and key not in used]  # also lists of choices
    return Row(asked if asked or there else None, text["response"] or (told or [""])[-1], gold,
               text["solution"], messages, unread)


def _first_filled(row: dict, names: tuple[str, ...]) -> str:
    return next((name for name in names if row.get(name) not in (None, []) and str(row[name]).strip()), "")


def _message(turn, **more):
    """ShareGPT's words for role and content replaced; what is no message stays, for a check to name it."""
    if not isinstance(turn, dict):
        return turn
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    return turn | more | {"role": ROLES.get(str(role).lower(), role), "content": content}
