"""Messages between pool, supervisor, zygote and runs: JSON, each after its length in four bytes. Standard
library only: both sides of the wall load this file."""

import json
import struct


def pack(message: dict) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack("=I", len(data)) + data


def take(heard: bytearray) -> dict | None:
    """Remove the first message from what was heard; None while it is not whole."""
    end = 4 + struct.unpack("=I", heard[:4])[0] if len(heard) >= 4 else 4
    if len(heard) < end:
        return None
    message = json.loads(heard[4:end])
    del heard[:end]
    return message
