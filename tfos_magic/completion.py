"""What Tab offers on a magic's line.

Runs on: notebook. Knows nothing of IPython: text in, choices out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tfos_magic import arguments

NAMEDTUPLE_ACTIONS = ("status", "revert", "restore")

_LINE = re.compile(r"^\s*(?P<percent>%{1,2})(?P<magic>tfos_\w+)[ \t](?P<rest>.*)$")
_COLUMNS = frozenset({"--label", "--features", "--weight"})
_CHOOSERS: Mapping[str, arguments.Chooser] = {
    "--data": arguments.names_of_frames,
    "--validation": arguments.names_of_frames,
    "--session": arguments.names_of_sessions,
    "--args": arguments.names_of_arguments,
}


def choices(text: str, token: str, namespace: Mapping[str, Any]) -> list[str] | None:
    """Return what may stand in place of `token`; None when the line is none of our magics.

    Parameters
    ----------
    text : str
        The line up to the cursor.
    token : str
        What the completer takes for the word at its end.
    namespace : mapping of str to object
        The notebook's globals.
    """
    match = _LINE.match(text)
    if match is None:
        return None
    if match["magic"] == "tfos_namedtuple":
        found = list(NAMEDTUPLE_ACTIONS)
    elif match["magic"] == "tfos_train":
        found = _train_choices(match["rest"], is_line=match["percent"] == "%", namespace=namespace)
    else:
        return None
    return [each for each in found if each.startswith(token)]


def _train_choices(rest: str, *, is_line: bool, namespace: Mapping[str, Any]) -> list[str]:
    before, _, current = rest.rpartition(" ")
    words = before.split()
    option = current.partition("=")[0] if "=" in current else (words[-1] if words else "")
    actions = arguments.option_strings()
    if option in actions and actions[option].nargs != 0:
        return _values(option, rest, namespace)
    unused = [text for text in actions if text not in words and text.startswith("--")]
    functions = arguments.names_of_functions(namespace) if is_line else []
    return unused if current.startswith("-") else [*functions, *unused]


def _values(option: str, rest: str, namespace: Mapping[str, Any]) -> list[str]:
    if option in _COLUMNS:
        data = re.search(r"--data[ =]+([A-Za-z_]\w*)", rest)
        return arguments.columns_of(data[1], namespace) if data else []
    chooser = _CHOOSERS.get(option)
    return chooser(namespace) if chooser else []
