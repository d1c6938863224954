"""Server-sent events: a reply that a server sends word by word, put together again."""

import contextlib
import json
from collections.abc import Iterator


def chunks(raw: bytes | bytearray) -> Iterator[dict]:
    """The JSON objects of the events that came whole. A last line may be cut; comments are left out."""
    for line in bytes(raw).split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            if line.startswith(b"data:") and isinstance(data := json.loads(line[5:]), dict):
                yield data


def joined(raw: bytes | bytearray) -> dict:
    """What a server that does not stream would have sent: one message, or the error that came between. The
    message broke off if neither a reason for its end came nor [DONE].

    >>> joined(b'data: {"choices": [{"delta": {"content": "Y"}}]}\\n\\n'
    ...        b'data: {"choices": [{"delta": {"content": "es"}}]}\\n\\ndata: [DONE]\\n\\n')
    {'choices': [{'message': {'content': 'Yes'}, 'finish_reason': 'stop'}], 'usage': None}
    """
    message, usage, reason = {"content": ""}, None, "stop" if b"data: [DONE]" in raw else None
    for data in chunks(raw):
        if data.get("error"):
            return data
        usage = data.get("usage") or usage
        for choice in data.get("choices") or []:
            reason = choice.get("finish_reason") or reason
            for name, piece in (choice.get("delta") or {}).items():
                if isinstance(piece, str) and name != "role":
                    message[name] = message.get(name, "") + piece
    return {"choices": [{"message": message, "finish_reason": reason}], "usage": usage}
