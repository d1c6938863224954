"""Shapes of rows: each is read as a problem and as a record to train on."""

import json

import pytest

import train_sft
from slm import checkpoint, problems
from slm.formats import rows
from slm.prompts import SOLVER
from slm.tokenizer import Tokenizer

STORY, SHOWN = "I have two hens.", "I have two hens. How many?"
SAID = r"Count them: \boxed{2}"
ASKED, ANSWERED = {"role": "user", "content": SHOWN}, {"role": "assistant", "content": SAID}
SYSTEM = {"role": "system", "content": "Be brief."}
STANDARD = [{"role": "user", "content": SOLVER(question=SHOWN)}, ANSWERED]


def share(*said):
    return [{"from": who, "value": text} for who, text in said]


SHAPES = {  # a row -> the conversation that is trained
    "question and response": ({"question": SHOWN, "response": SAID}, STANDARD),
    "problem and solution": ({"problem": SHOWN, "solution": SAID}, STANDARD),
    "a story": ({"Body": STORY, "Question": "How many?", "response": SAID}, STANDARD),
    "a story, other words": ({"STORY": STORY, "question ": "How many?", "output": SAID}, STANDARD),
    "a story told twice": ({"context": STORY, "question": SHOWN, "response": SAID}, STANDARD),
    "system, question, response": ({"system_prompt": "Be brief.", "question": SHOWN, "response": SAID},
                                   [SYSTEM, ASKED, ANSWERED]),
    "prompt and completion": ({"prompt": SHOWN, "completion": SAID}, [ASKED, ANSWERED]),
    "prompt and completion, lists": ({"prompt": [SYSTEM, ASKED], "completion": [ANSWERED]},
                                     [SYSTEM, ASKED, ANSWERED]),
    "Alpaca": ({"instruction": SHOWN, "input": "", "output": SAID}, [ASKED, ANSWERED]),
    "Dolly": ({"instruction": "How many?", "context": STORY, "response": SAID}, [ASKED, ANSWERED]),
    "ShareGPT": ({"conversations": share(("system", "Be brief."), ("human", SHOWN), ("gpt", SAID))},
                 [SYSTEM, ASKED, ANSWERED]),
    "ShareGPT with roles of others": ({"conversations": share(("User", SHOWN), ("Assistant", SAID))},
                                      [ASKED, ANSWERED]),
    "ShareGPT beside a system": (
        {"system": "Be brief.", "conversations": share(("human", SHOWN), ("gpt", SAID))},
        [SYSTEM, ASKED, ANSWERED]),
    "messages": ({"messages": [ASKED, ANSWERED]}, [ASKED, ANSWERED]),
    "problem, solution, messages": ({"problem": SHOWN, "solution": SAID, "messages": [ASKED, ANSWERED]},
                                    [ASKED, ANSWERED])}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_a_problem_and_a_record(tmp_path, shape):
    row, conversation = SHAPES[shape]
    path = tmp_path / "mine.jsonl"
    path.write_bytes("\ufeff".encode() + f"{json.dumps(row)}\r\n\r\n{json.dumps(row)}\r\n".encode())
    found = [talk for _, talk in train_sft.read(str(path), None)]
    assert [[(m["role"], m["content"]) for m in talk] for talk in found] == 2 * [
        [(m["role"], m["content"]) for m in conversation]]
    assert [(p.question, p.gold, p.solution) for p in problems.load(str(path))] == 2 * [(SHOWN, "2", SAID)]


def test_an_input_stands_behind_its_instruction():
    assert rows.read({"instruction": "Add.", "input": "1 and 1"}).question == "Add.\n1 and 1"
    assert rows.read({"question": "1 + 1?", "input": "4 5"}).unread == ["input"]


def test_of_a_prompt_with_turns_only_the_completion_is_trained(tmp_path):
    earlier = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, ASKED]
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": earlier, "completion": [ANSWERED]}))
    (talk,) = [talk for _, talk in train_sft.read(str(path), None)]
    tokenizer = Tokenizer.load(checkpoint.TINY)
    row = train_sft.encode(tokenizer, talk)
    trained = tokenizer.decode([i for i, m in zip(row.ids, row.mask) if m], skip_special=False)
    assert trained == SAID + "<|im_end|>"


def test_rows_for_reinforcement_learning_hold_their_question_in_a_list_of_messages(tmp_path):
    path = tmp_path / "mine.json"  # verl's fields, as Skywork has them
    path.write_text(json.dumps([{"data_source": "x", "prompt": [SYSTEM, ASKED], "ability": "math",
                                 "reward_model": {"ground_truth": '["2"]', "style": "rule"}}]))
    assert [(p.question, p.gold) for p in problems.load(str(path))] == [(SHOWN, "2")]


def test_a_conversation_of_several_questions_is_trained_and_is_no_problem(tmp_path, capsys):
    long = {"conversations": share(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", SAID))}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(SHAPES["ShareGPT"][0]) + "\n" + json.dumps(long) + "\n")
    assert [len(talk) for talk in [talk for _, talk in train_sft.read(str(path), None)]] == [3, 4]
    assert len(problems.load(str(path))) == 1
    assert "left out 1 of 2 rows, without a gold answer or with several" in capsys.readouterr().err


def test_what_else_a_message_holds_is_kept():
    (turn,) = rows.read({"conversations": [{"from": "gpt", "value": "x", "weight": 0}]}).messages
    assert (turn["role"], turn["content"], turn["weight"]) == ("assistant", "x", 0)


@pytest.mark.parametrize("row", [{"conversations": "Human: a"}, {"messages": [["user", "a"]]},
                                 {"conversations": [{"from": ["gpt"], "value": 3}]},
                                 {"conversation": -1}, {"conversation": True},
                                 {"prompt": "a", "output": [{"content": "b"}]},
                                 {"prompt": "a", "output": [{}]},
                                 {"prompt": [ASKED], "completion": 5}, {"prompt": ["a"], "completion": "b"}])
def test_a_broken_conversation_is_one_sentence(tmp_path, row):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(train_sft.BadInput, match="line 1: messages must be a list of role and content"):
        [talk for _, talk in train_sft.read(str(path), None)]
    with pytest.raises(problems.BadInput, match="line 1"):
        problems.load(str(path))


@pytest.mark.parametrize("turn", [
    {"role": "assistant", "content": " "},
    {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "f"}}]}])
def test_a_turn_of_which_nothing_or_only_a_part_would_be_trained_is_refused(turn):
    """Its tool calls are not written: the model would learn to end its reply at once, or without the call."""
    with pytest.raises(train_sft.BadInput, match=r"x line 1: messages must be .* no tool_calls"):
        train_sft.messages_of({"messages": [ASKED, turn, ASKED, ANSWERED]}, "x line 1")
    skipped = {"role": "assistant", "content": "", "weight": 0, "tool_calls": None}
    assert train_sft.messages_of({"messages": [ASKED, skipped, ASKED, ANSWERED]}, "x")[1][1] == skipped


def test_a_field_that_is_null_is_called_empty():
    with pytest.raises(train_sft.BadInput, match=r"found question, response \(empty\)"):
        train_sft.messages_of({"question": SHOWN, "response": None}, "x line 1")


def test_choices_that_are_not_shown_to_the_model_are_named():
    row = {"question": "1 + 1?", "options": ["1", "2"], "answer": "B", "tags": ["sum"]}
    assert rows.read(row).unread == ["options"]
