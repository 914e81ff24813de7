from __future__ import annotations

import inspect
import json
import pickle
from typing import Any

import pytest

from tfos_magic import errors
from tfos_magic.errors import NodeError, RemoteException, TfosError
from tfos_magic.failures import Failure, describe_launch_error, error_of, root_of

NODES = {0: ("chief:0", "a"), 1: ("worker:0", "b"), 2: ("worker:1", "c")}


def raised() -> RemoteException:
    def inner() -> None:
        raise ValueError("no such row")

    try:
        try:
            {}["a"]
        except KeyError as error:
            raise RuntimeError("outer") from error
    except RuntimeError as outer:
        try:
            inner()
        except ValueError as error:
            error.__context__ = outer
            error.add_note("a note") if hasattr(error, "add_note") else None
            return RemoteException.from_exception(error)


def every_error() -> list[type[TfosError]]:
    return [
        cls
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, TfosError) and cls.__module__ == errors.__name__
    ]


@pytest.mark.parametrize("cls", every_error())
def test_every_error_survives_pickling_with_its_fields(cls: type[TfosError]) -> None:
    fields: dict[str, Any] = {"cause": "why", "hint": "do this"}
    if issubclass(cls, NodeError):
        fields |= {"node": "worker:1", "host": "h", "remote": raised(), "log_lines": ("one", "two")}
    if cls is errors.TooFewSlotsError:
        fields |= {"needed": 4, "available": 2}
    if cls is errors.ShippingError:
        fields |= {"path": "f → x"}
    error = cls("the fact", **fields)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert again.__dict__ == error.__dict__
    assert str(again) == str(error)
    assert "the fact" in str(again)


def test_every_error_stands_in_the_table_of_the_module() -> None:
    for cls in every_error():
        if cls is not TfosError:
            assert cls.__name__ in str(errors.__doc__)


def test_a_remote_exception_survives_json_with_frames_causes_and_notes() -> None:
    remote = raised()
    again = RemoteException.from_json(json.loads(json.dumps(remote.to_json())))
    assert again == remote
    text = "\n".join(again.render())
    assert text.index("KeyError") < text.index("direct cause") < text.index("RuntimeError: outer")
    assert text.index("During handling") < text.index("ValueError: no such row")
    assert 'raise ValueError("no such row")' in text


def test_cells_are_called_what_the_notebook_calls_them() -> None:
    remote = raised()
    text = "\n".join(remote.render({__file__: "Cell In[4]"}))
    assert "Cell In[4], line" in text
    assert __file__ not in text


def test_an_exception_whose_str_raises_can_still_be_told() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert "RuntimeError" in RemoteException.from_exception(Odd()).message


def test_a_chain_of_causes_without_end_is_cut() -> None:
    first, second = ValueError("1"), ValueError("2")
    first.__cause__, second.__cause__ = second, first
    assert len("\n".join(RemoteException.from_exception(first).render())) < 10_000


def user(node: int, name: str, message: str = "") -> Failure:
    return Failure("user", node=node, remote=RemoteException(name, message))


def test_the_root_is_the_failure_that_explains_the_others() -> None:
    consequence = user(1, "tfos_magic.training.ring.PeerLostError", "chief:0 went away")
    root = user(0, "ZeroDivisionError", "division by zero")
    assert root_of([consequence, Failure("lost", node=2), root]) is root
    killed = Failure("exited", node=2, code=-9)
    assert root_of([consequence, killed]) is killed
    assert root_of([Failure("launch", error=TfosError("x")), Failure("lost", node=1)]).kind == "lost"


def test_further_failures_of_their_own_are_listed_in_a_line_each() -> None:
    first, second = user(0, "ValueError", "a"), user(2, "KeyError", "b")
    text = str(error_of(first, [first, second], NODES, {}))
    assert "chief:0 on a raised ValueError." in text
    assert "worker:1 failed too, by itself: KeyError: b" in text


def test_signals_are_named() -> None:
    assert "signal 11 (SIGSEGV)" in str(error_of(Failure("exited", node=1, code=-11), [], NODES, {}))


def test_several_columns_into_a_model_of_one_input_get_a_hint() -> None:
    failure = user(0, "ValueError", 'Layer "dense" expects 1 input(s), but it received 2 input tensors.')
    assert "dict by column name" in str(error_of(failure, [failure], NODES, {}))


def test_what_spark_wraps_around_an_unreachable_driver_is_unwrapped() -> None:
    answer = '{"error": "h cannot reach x", "cause": "c", "hint": "d"}'
    text = f"Job aborted\nTraceback\nRuntimeError: tfos_magic:{answer}\n\n at org"
    error = describe_launch_error(Exception(text))
    assert type(error).__name__ == "RendezvousError"
    assert str(error) == "h cannot reach x\nc\nd"


def test_the_headline_is_short_and_says_what_was_raised() -> None:
    failure = user(0, "ValueError", "first line\nsecond line")
    assert error_of(failure, [failure], NODES, {}).headline == "chief:0 on a raised ValueError.\nValueError: first line"
