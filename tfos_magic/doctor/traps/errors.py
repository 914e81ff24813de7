"""Exceptions: they are rebuilt by calling their class with their args, which need not be what it takes.

Runs on: driver.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from tfos_magic.doctor.case import Case
from tfos_magic.doctor.findings import Finding, Verdict


def look(case: Case) -> Iterator[Finding]:
    """Yield the exceptions that would not arrive, or not as they are."""
    outcomes = list(case.facts.get("exceptions", ()))
    for position, node in enumerate(node for node in case.graph if is_rebuilt_by_call(node.value)):
        cls = type(node.value)
        name = cls.__name__
        fix = (
            f"def __reduce__(self): return {name}, (…)  # what __init__ takes; "
            "or pass the same arguments on to super().__init__"
        )
        if not _takes(cls, node.value.args):
            count = len(node.value.args)
            arguments = f"{count} argument{'s' * (count != 1)}"
            why = f"It is rebuilt as {name}(*args), and its __init__ does not take {arguments}."
            yield case.finding(node, "exception-init", Verdict.BREAKS, why, fix)
        elif outcomes[position : position + 1] == [False]:
            why = f"It is rebuilt as {name}(*args), and its __init__ makes other args of them: the message changes."
            yield case.finding(node, "exception-init", Verdict.WRONG, why, fix)


def is_rebuilt_by_call(value: Any) -> bool:
    """Tell whether it is an exception with an ``__init__`` of its own that leaves pickling to Python."""
    cls: Any = type(value)
    return (
        isinstance(value, BaseException)
        and cls.__reduce__ is BaseException.__reduce__
        and inspect.isfunction(cls.__init__)
        and cls.__reduce_ex__ is object.__reduce_ex__
    )


def _takes(cls: Any, args: tuple[Any, ...]) -> bool:
    try:
        inspect.signature(cls.__init__).bind(None, *args)
    except TypeError:
        return False
    except ValueError:  # no signature to be had
        return True
    return True
