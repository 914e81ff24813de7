"""What Tab offers on a magic's line.

Runs on: notebook. Knows nothing of IPython: text in, choices out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tfos_magic import arguments

_LINE = re.compile(r"^\s*(?P<percent>%{1,2})(?P<magic>tfos_\w+)[ \t](?P<rest>.*)$")
_COLUMNS = frozenset({"--label", "--features", "--weight", "--keep"})
_CHOOSERS: Mapping[str, arguments.Chooser] = {
    "--data": arguments.names_of_frames,
    "--validation": arguments.names_of_frames,
    "--session": arguments.names_of_sessions,
    "--args": arguments.names_of_arguments,
    "--grid": arguments.names_of_grids,
    "--mode": lambda _: list(arguments.SAVE_MODES),
}
_NO_RUNS: Mapping[str, Sequence[str]] = {}
_RUNNABLE: Mapping[str, arguments.Chooser] = {
    "tfos_train": arguments.names_of_functions,
    "tfos_infer": arguments.names_of_predictors,
    "tfos_doctor": arguments.names_of_all,
}


def choices(
    text: str,
    token: str,
    namespace: Mapping[str, Any],
    standing: Sequence[str] = (),
    runs: Mapping[str, Sequence[str]] = _NO_RUNS,
) -> list[str] | None:
    """Return what may stand in place of `token`; None when the line is none of our magics.

    Parameters
    ----------
    text : str
        The line up to the cursor.
    token : str
        What the completer takes for the word at its end.
    namespace : mapping of str to object
        The notebook's globals.
    standing : sequence of str
        What ``%tfos_stop`` can stop.
    runs : mapping of str to sequence of str
        Name of each run, the last one last → its nodes.
    """
    match = _LINE.match(text)
    if match is None:
        return None
    magic = match["magic"]
    if magic == "tfos_namedtuple":
        found = [*arguments.NAMEDTUPLE_ACTIONS, *arguments.NAMEDTUPLE_OPTIONS]
    elif magic == "tfos_stop":
        found = list(standing)
    elif magic == "tfos_status":
        found = [*runs]
    elif magic == "tfos_logs":
        found = _of_logs(match["rest"], token, runs)
    elif magic in arguments.PARSERS:
        chooser = _RUNNABLE[magic] if match["percent"] == "%" else None
        found = _options_and_names(magic, match["rest"], chooser, namespace)
    else:
        return None
    return [each for each in found if each.startswith(token)]


def _of_logs(rest: str, token: str, runs: Mapping[str, Sequence[str]]) -> list[str]:
    before, _, current = rest.rpartition(" ")
    if re.search(r"--run[ =]+$", rest.removesuffix(token)):
        return [*runs]
    words = before.split()
    actions = arguments.option_strings("tfos_logs")
    if words and words[-1] in actions and actions[words[-1]].nargs != 0:
        return []
    unused = [text for text in actions if text not in words and text.startswith("--")]
    if current.startswith("-"):
        return unused
    named = re.search(r"--run[ =]+(\S+)", rest)
    nodes = runs.get(named[1], ()) if named else next(reversed([*runs.values()]), ())
    # The completer takes a node's name for two words, with the colon between them.
    typed = len(current) - len(token)
    return [*(name[typed:] for name in nodes if name.startswith(current)), *([] if current else unused)]


def _options_and_names(
    magic: str, rest: str, chooser: arguments.Chooser | None, namespace: Mapping[str, Any]
) -> list[str]:
    before, _, current = rest.rpartition(" ")
    words = before.split()
    option = current.partition("=")[0] if "=" in current else (words[-1] if words else "")
    actions = arguments.option_strings(magic)
    if option in actions and actions[option].nargs != 0:
        return _values(option, rest, namespace)
    unused = [text for text in actions if text not in words and text.startswith("--")]
    names = chooser(namespace) if chooser is not None else []
    return unused if current.startswith("-") else [*names, *unused]


def _values(option: str, rest: str, namespace: Mapping[str, Any]) -> list[str]:
    if option in _COLUMNS:
        data = re.search(r"--data[ =]+([A-Za-z_]\w*)", rest)
        return arguments.columns_of(data[1], namespace) if data else []
    chooser = _CHOOSERS.get(option)
    return chooser(namespace) if chooser else []
