"""A magic's line becomes words.

Runs on: notebook.
"""

from __future__ import annotations

import re
from typing import Any

from tfos_magic.errors import UsageError

_BRACKETS = {"(": ")", "[": "]", "{": "}"}


def split(line: str) -> list[str]:
    """Split a line as a shell would, but keep brackets together.

    Quotes hold words together and disappear, except within brackets, where they belong to the expression.

    Examples
    --------
    >>> split('--data df.filter("x > 1") --label "my label"')
    ['--data', 'df.filter("x > 1")', '--label', 'my label']
    """
    words: list[str] = []
    position = 0
    while position < len(line):
        if line[position].isspace():
            position += 1
            continue
        word, position = _word(line, position)
        words.append(word)
    return words


def raw_words(line: str) -> list[tuple[int, int]]:
    """Return where each word of a line begins and ends, with its quotes: for words that belong to an expression.

    Examples
    --------
    >>> raw_words('f("a b") + 1')
    [(0, 8), (9, 10), (11, 12)]
    """
    found: list[tuple[int, int]] = []
    position = 0
    while position < len(line):
        if line[position].isspace():
            position += 1
            continue
        _, end = _word(line, position)
        found.append((position, end))
        position = end
    return found


def _word(line: str, position: int) -> tuple[str, int]:
    pieces: list[str] = []
    while position < len(line) and not line[position].isspace():
        character = line[position]
        if character in "\"'":
            end = _closing_quote(line, position)
            pieces.append(_unescape(line[position + 1 : end - 1], character))
        elif character in _BRACKETS:
            end = closing_bracket(line, position)
            pieces.append(line[position:end])
        elif character == "\\" and position + 1 < len(line):
            end = position + 2
            pieces.append(line[position + 1])
        else:
            end = position + 1
            pieces.append(character)
        position = end
    return "".join(pieces), position


def _closing_quote(line: str, start: int) -> int:
    """Return the position after the quote that closes the one at `start`."""
    position = start + 1
    while position < len(line):
        if line[position] == "\\" and line[start] == '"':
            position += 2
        elif line[position] == line[start]:
            return position + 1
        else:
            position += 1
    raise UsageError(f"The quote in {short(line[start:])} is never closed.")


def _unescape(text: str, quote: str) -> str:
    return re.sub(r'\\(["\\$`])', r"\1", text) if quote == '"' else text


def closing_bracket(line: str, start: int) -> int:
    """Return the position after the bracket that closes the one at `start`; UsageError when none does."""
    open_brackets: list[str] = []
    position = start
    while position < len(line):
        character = line[position]
        if character in "\"'":
            position = _closing_quote(line, position)
            continue
        if character in _BRACKETS:
            open_brackets.append(_BRACKETS[character])
        elif open_brackets and character == open_brackets[-1]:
            open_brackets.pop()
            if not open_brackets:
                return position + 1
        position += 1
    raise UsageError(f"The bracket in {short(line[start:])} is never closed.")


def short(text: Any) -> str:
    """Return `text` within 60 characters, for messages."""
    text = str(text)
    return text if len(text) <= 60 else f"{text[:59]}…"
