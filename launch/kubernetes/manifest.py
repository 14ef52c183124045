"""Documents as YAML text.

launch has no dependencies beyond absl, and JSON, which is YAML too, is not what people want to read
and edit; so this writes the small part of YAML that the documents need: mappings and sequences in
block style, one line for each scalar. Strings that any parser could take for something else are
quoted.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9._/-]*")
# What YAML 1.1 or 1.2 parsers read as a boolean or as nothing.
_WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}


def text(documents: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """The documents, one after another, below `notes` as comments of one line each."""
    head = [f"# {note}".rstrip() for note in notes]
    parts = ["\n".join(["---", *_lines(document)]) for document in documents]
    return "\n".join([*head, *parts]) + "\n"


def _lines(value: dict | list) -> Iterator[str]:
    """The lines of a block, which its parent indents."""
    items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    for key, item in items:
        head = "-" if key is None else f"{_scalar(key)}:"
        if not isinstance(item, dict | list):
            yield f"{head} {_scalar(item)}"
        elif not item:
            yield f"{head} {'{}' if isinstance(item, dict) else '[]'}"
        elif key is None:
            first, *rest = _lines(item)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
        else:
            yield head
            yield from (f"  {line}" for line in _lines(item))


def _scalar(value: str | bool | int) -> str:
    if not isinstance(value, str):
        return json.dumps(value)  # true, false and whole numbers are the same in YAML
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    if value.isprintable() and ('"' in value or "\\" in value):
        return "'" + value.replace("'", "''") + "'"  # no escapes in these: JSON stays readable
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else _escape(char) for char in quoted)


def _escape(char: str) -> str:
    """YAML has no surrogate pairs, and takes some characters for line breaks that JSON does not."""
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
