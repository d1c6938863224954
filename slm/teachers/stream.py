"""Server-sent events: a reply that comes word by word, put together as if it had come whole."""

import contextlib
import json


def joined(raw: bytes | bytearray) -> dict:
    """What a server that does not stream would have sent: one message, or the error that came between. The
    message broke off if neither a reason for its end came nor [DONE]. A line that is not whole waits."""
    message, usage, reason = {"content": ""}, None, "stop" if b"data: [DONE]" in raw else None
    for line in bytes(raw).split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError):  # no event of ours
            data = json.loads(line.removeprefix(b"data:"))
            if data.get("error"):
                return {**data, "choices": []}
            usage = data.get("usage") or usage
            for choice in data.get("choices") or []:
                reason = choice.get("finish_reason") or reason
                for name, piece in (choice.get("delta") or {}).items():
                    if isinstance(piece, str) and name != "role":
                        message[name] = message.get(name, "") + piece
    return {"choices": [{"message": message, "finish_reason": reason}], "usage": usage}
