"""What an object drags along, as cloudpickle sees it: a tree in which every object knows how it was reached.

Runs on: driver.

    value ──Tracer: the pickler's own recursion──► Node(step, value, how, size_bytes, parts, obstacle or error)

The tracer pickles for real, so it asks each object what pickling asks it, and nothing else. Where something cannot be
pickled it goes on beside it, so that one look finds everything. Long containers are sampled, what is large or comes
late is pickled at full speed and seen from outside only: a look takes about a second at most.
"""

from __future__ import annotations

import pickle
import sys
import time
import types
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tfos_magic import tracing
from tfos_magic.doctor.dialects import Dialect, RefusedError
from tfos_magic.doctor.findings import Part
from tfos_magic.obstacles import Obstacle
from tfos_magic.tracing import Step

BUDGET_S = 0.7
"""From then on what is met is pickled at full speed."""

_DEEP = 60
_LONG = 256
_LARGE = 10_000
_SAMPLE = 32
_LARGE_ATOM_BYTES = 100_000

_ATOMS = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
_FLAT = frozenset(_ATOMS)
# What pickling makes up on its way; they are looked through.
_MADE_UP = frozenset({tuple, dict, list, set, types.CodeType, types.CellType})
_SHOWN_PARTS = 12
_SHOWN_DEPTH = 8


@dataclass(eq=False)
class Node:
    """One object on the way."""

    step: Step
    value: Any
    parent: Node | None
    how: str = "by value"
    size_bytes: int = 0
    parts: list[Node] = field(default_factory=list)
    obstacle: Obstacle | None = None
    """It is known not to travel."""
    error: Exception | None = None
    """Pickling it failed, and it is not known why."""
    is_by_name: bool = False
    """It is pickled as a name in ``__main__``."""
    is_named: bool = True
    steps: dict[int, Step] | None = None

    @property
    def is_by_value(self) -> bool:
        """Its content is in the pickle."""
        return self.how == "by value"

    @property
    def path(self) -> tuple[str, ...]:
        """The steps from the root, its name first."""
        above = self.parent.path if self.parent is not None else ()
        return (*above, self.step.words)

    @property
    def chain(self) -> Iterator[Node]:
        """The node itself, and those above it."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def walk(self) -> Iterator[Node]:
        """Yield this node and all below it, in the order in which they were met."""
        todo = [self]
        while todo:
            node = todo.pop()
            yield node
            todo.extend(reversed(node.parts))


@dataclass(eq=False)
class Graph:
    """A traced object."""

    root: Node
    modules: dict[str, None]
    """Modules that must be there to unpickle it."""

    def __iter__(self) -> Iterator[Node]:
        return self.root.walk()

    @property
    def functions(self) -> Iterator[tuple[Node, types.FunctionType]]:
        """Functions of which the code travels."""
        for node in self:
            if isinstance(node.value, types.FunctionType) and node.is_by_value:
                yield node, node.value

    @property
    def classes(self) -> Iterator[tuple[Node, type]]:
        """Classes of which the code travels."""
        for node in self:
            if isinstance(node.value, type) and node.is_by_value:
                yield node, node.value

    def to_part(self) -> Part:
        """Return the tree as a record, pruned to what is worth reading."""
        return _part(self.root, _SHOWN_DEPTH)


def trace(value: Any, name: str, dialect: Dialect, budget_s: float = BUDGET_S) -> Graph:
    """Follow the pickling of `value`.

    Parameters
    ----------
    value : object
    name : str
        How it is called.
    dialect : Dialect
    budget_s : float
    """
    return Tracer(dialect, budget_s).trace(value, name)


class _ClaimedError(Exception):
    """What failed belongs to an object further up that is known not to travel."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node


class Tracer(tracing.TracingPickler):
    """The pickler that makes the tree.

    Parameters
    ----------
    dialect : Dialect
    budget_s : float
    """

    def __init__(self, dialect: Dialect, budget_s: float) -> None:
        super().__init__(dialect.pickler)
        self._dialect = dialect
        self._until = time.monotonic() + budget_s
        self._modules: dict[str, None] = {}
        self._here: Node | None = None
        self._depth = 0

    def trace(self, value: Any, name: str) -> Graph:
        """Return the tree of `value`."""
        root = Node(Step(name, name), value, None)
        self._visit(root)
        return Graph(root, self._modules)

    def trace_all(self, values: Iterable[tuple[Step, Any]], name: str, value: Any) -> Graph:
        """Return a tree of which the root holds `values`; for a cell, whose own pickle is of no interest."""
        root = self._here = Node(Step(name, name), value, None)
        for step, part in values:
            self._visit(self._add(step, part))
        root.size_bytes = self.counter.size_bytes
        return Graph(root, self._modules)

    # --- what the pickler calls ---

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Pickle `obj` as part of where we are."""
        here = self._here
        if here is None or id(obj) in self.memo:
            self._save_plainly(obj)
            return
        step = self._step_to(here, obj)
        if step is None and (type(obj) in _MADE_UP or _is_atom(obj)):
            self._save_shortened(obj)
        elif step is not None and _is_atom(obj) and not isinstance(here.value, types.FunctionType):
            self._save_plainly(obj)
        else:
            self._visit(self._add(step, obj))

    def reducer_override(self, obj: Any) -> Any:
        """Ask the dialect, and note modules."""
        if isinstance(obj, types.ModuleType) and sys.modules.get(obj.__name__) is obj:
            self._note_import(obj, obj.__name__)
        return self._dialect.reduce(obj, self.reduce_as_cloudpickle)

    def save_global(self, obj: Any, name: Any = None) -> None:
        """Note what travels as a name of its module."""
        super().save_global(obj, name)  # type: ignore[misc]  # not in typeshed
        module = getattr(obj, "__module__", None)
        if isinstance(module, str):
            self._note_import(obj, module)

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)
    dispatch[types.FunctionType] = save_global

    def save_type(self, obj: Any) -> None:
        """As save_global, but for the few types that have no name."""
        if obj in (type(None), type(NotImplemented), type(...)):
            super().save_type(obj)  # type: ignore[misc]  # not in typeshed
        else:
            self.save_global(obj)

    dispatch[type] = save_type

    # --- one object ---

    def _add(self, step: Step | None, obj: Any) -> Node:
        here = self._here
        node = Node(step or Step(f"its {type(obj).__name__}", ""), obj, here, is_named=step is not None)
        if here is not None:
            here.parts.append(node)
        return node

    def _visit(self, node: Node) -> None:
        before, above = self.counter.size_bytes, self._here
        self._here = node
        self._depth += 1
        try:
            self._save_part(node)
        except _ClaimedError as claim:
            if claim.node is not node:
                raise
        except Exception as error:  # any __reduce__ may raise anything
            self._blame(node, error)
        finally:
            self._depth -= 1
            self._here = above
            node.size_bytes = self.counter.size_bytes - before
            if _is_noise(node) and above is not None and above.parts[-1:] == [node]:
                above.parts.pop()

    def _save_part(self, node: Node) -> None:
        node.obstacle = self._dialect.find_obstacle(node.value)
        if node.obstacle is not None:
            node.how = "stays behind"
            self._save_plainly(None)
        else:
            self._save_shortened(node.value)

    def _save_shortened(self, obj: Any) -> None:
        kind = type(obj)
        if kind in (list, tuple, set, frozenset, dict) and len(obj) > _LONG:
            self._save_long(obj)
        elif _is_large_container(obj) or (
            (self._depth > _DEEP or time.monotonic() > self._until) and kind not in _MADE_UP and not _is_atom(obj)
        ):
            self._save_unseen(obj)
        else:
            self._save_plainly(obj)

    def _save_plainly(self, obj: Any) -> None:
        super().save(obj)  # type: ignore[misc]  # not in typeshed

    def _blame(self, node: Node, error: Exception) -> None:
        """Say of the outermost object that is known not to travel that it failed, else of this one."""
        if isinstance(error, RefusedError):
            node.obstacle, node.how = error.obstacle, "stays behind"
            return
        for above in reversed(list(node.chain)):
            known = self._dialect.explain(above.value)
            if known is not None:
                above.obstacle, above.how = known, "stays behind"
                above.parts.clear()
                if above is not node:
                    raise _ClaimedError(above) from None
                return
        node.error, node.how = error, "stays behind"

    def _step_to(self, here: Node, obj: Any) -> Step | None:
        if here.steps is None:
            is_long = isinstance(here.value, list | tuple | set | frozenset | dict) and len(here.value) > _LONG
            here.steps = {} if is_long else tracing.parts_by_id(here.value)
        # Each step once: small numbers are many things at the same time.
        return here.steps.pop(id(obj), None)

    def _note_import(self, obj: Any, module: str) -> None:
        self._modules[module] = None
        here = self._here
        if here is not None and here.value is obj:
            if module == "__main__":
                here.is_by_name = True
            here.how = f"by import of {module}"

    # --- what is many or large ---

    def _save_long(self, obj: Any) -> None:
        """Pickle a long container: plain values at once, of others the first ones piece by piece."""
        values = [*dict.keys(obj), *dict.values(obj)] if isinstance(obj, dict) else obj
        if _FLAT.issuperset(map(type, values)):
            self.counter.write(pickle.dumps(obj, 5))
        else:
            steps = list(_long_parts(obj))
            for step, value in steps[:_SAMPLE]:
                self._save_item(step, value)
            rest = steps[_SAMPLE:]
            if not self._count([value for _, value in rest]):
                self._find_first_failure(rest)
        self.memoize(obj)

    def _save_item(self, step: Step, value: Any) -> None:
        if _is_atom(value) or id(value) in self.memo:
            self._save_plainly(value)
        else:
            self._visit(self._add(step, value))

    def _find_first_failure(self, parts: list[tuple[Step, Any]]) -> None:
        while len(parts) > 1:
            first, second = parts[: len(parts) // 2], parts[len(parts) // 2 :]
            parts = second if self._count([value for _, value in first]) else first
        self._until = time.monotonic() + BUDGET_S
        self._save_item(*parts[0])

    def _count(self, value: Any) -> bool:
        """Pickle at full speed; return whether that succeeded."""
        counter = tracing.Counter()
        try:
            self._dialect.dump(value, counter, self._meet)
        except Exception:  # what it is will be found when the part at fault is traced
            return False
        self.counter.size_bytes += counter.size_bytes
        return True

    def _save_unseen(self, obj: Any) -> None:
        before = self.counter.size_bytes
        self._dialect.dump(obj, self.counter, self._meet)
        if self.counter.size_bytes > before and id(obj) not in self.memo:
            self.memoize(obj)

    def _meet(self, obj: Any) -> None:
        """Note an object of what is pickled unseen: one of each kind."""
        here = self._here
        if here is None or obj is here.value:
            return
        if isinstance(obj, types.FunctionType | type | types.ModuleType):
            module = obj.__name__ if isinstance(obj, types.ModuleType) else obj.__module__
            if isinstance(module, str) and module != "__main__":
                self._modules[module] = None
            return
        if not any(type(part.value) is type(obj) for part in here.parts):
            here.parts.append(Node(Step(f"somewhere inside, {tracing.kind_of(obj)}", ""), obj, here))


def _long_parts(obj: Any) -> Iterator[tuple[Step, Any]]:
    for step, value in tracing.parts(obj):
        if value is not type(obj):
            yield step, value


def _is_atom(obj: Any) -> bool:
    kind = type(obj)
    return kind in _FLAT and not (kind in (str, bytes) and len(obj) > _LARGE_ATOM_BYTES)


def _is_large_container(obj: Any) -> bool:
    return isinstance(obj, dict | list | set | deque) and type(obj) not in (list, set, dict) and len(obj) > _LARGE


def _is_noise(node: Node) -> bool:
    """Tell what pickling itself brought: functions that rebuild, and classes, by import; small made-up values."""
    if node.obstacle or node.error or node.is_by_name or node.parent is None or node.parts:
        return False
    if not node.is_named:
        return not node.is_by_value or type(node.value).__module__ in ("builtins", "_io", "copyreg")
    return node.step.words.startswith(("class ", "base ", "metaclass ")) and not node.is_by_value


# --- the tree as a record ----------------------------------------------------------------------------------


def _part(node: Node, depth: int) -> Part:
    parts = sorted(filter(_is_shown, node.parts), key=lambda part: (not _is_stopped(part), -part.size_bytes))
    shown = parts[:_SHOWN_PARTS] if depth else []
    return Part(
        step=node.step.words,
        kind=tracing.kind_of(node.value),
        how=node.how,
        size_bytes=node.size_bytes,
        parts=tuple(_part(part, depth - 1) for part in shown),
        more=len(parts) - len(shown),
    )


def _is_shown(node: Node) -> bool:
    if _is_stopped(node):
        return True
    if node.parent is not None and isinstance(node.parent.value, type):
        return not _is_generated(node.value) or any(map(_is_stopped, node.walk()))
    return node.is_named or bool(node.parts)


def _is_generated(value: Any) -> bool:
    """Tell what namedtuple, dataclass and enum put into a class."""
    function = getattr(value, "__func__", value)
    if not isinstance(function, types.FunctionType):
        return type(value).__name__ in ("_tuplegetter", "tuple", "MemberDescriptorType")
    name = str(function.__module__)
    return function.__code__.co_filename.startswith("<string>") or name in ("collections", "enum", "dataclasses")


def _is_stopped(node: Node) -> bool:
    return node.obstacle is not None or node.error is not None or node.is_by_name
