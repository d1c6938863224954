"""Who writes solutions: servers, the cascade that asks them, and the records that are kept.

    endpoint   Endpoint: any OpenAI-compatible server as a backend (threads, retries, limits, quirks)
    stream     replies that a server sends word by word
    cascade    a TOML file of teachers; Attempt: one question to one teacher; Progress: what is due;
               Asking: the loop that keeps all teachers busy and files every attempt as it lands
    records    assess: is this reply a training record, or why not; Leaks: overlap with test sets; summarize

A teacher of round 1 gets every problem. Its reply becomes a record when it is whole, shows its steps and has
the right answer in one box. Problems without a record go to round 2. All state is in two journals,
records.jsonl and rejected.jsonl, so a killed run goes on where it was. Imports no torch.
"""

from slm.teachers import cascade, records
from slm.teachers.endpoint import Endpoint, open_session, told_tokens

__all__ = ["Endpoint", "cascade", "open_session", "records", "told_tokens"]
