"""The pickling doctor: what happens to an object on its way to an executor and back.

Runs on: driver.

    value ──graph.trace────────► what it drags along, how each thing is reached, what stops the pickler
          ──round_trip─────────► the same object in a clean second interpreter: facts
          ──remote─────────────► … on real executors, where they are asked
                 │
                 ▼ traps.look(case): what is known to go wrong, each with its path, a reason and what to type
          Diagnosis ──► widgets.diagnosis draws it; code reads it

Nothing of the user's is changed or run that pickling itself would not run; nothing is unpickled in this process, where
cloudpickle would overwrite the user's classes.

Examples
--------
>>> from tfos_magic import doctor
>>> doctor.examine(train_step, "train_step").findings[0].words                       # doctest: +SKIP
'train_step → closure model → attribute optimizer → attribute lock'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tfos_magic.doctor.doctor import Doctor
from tfos_magic.doctor.findings import Diagnosis, Finding, Part, Trip, Verdict
from tfos_magic.doctor.round_trip import SecondInterpreter

__all__ = ["Diagnosis", "Doctor", "Finding", "Part", "SecondInterpreter", "Trip", "Verdict", "examine"]


def examine(
    value: Any,
    name: str = "value",
    *,
    round_trip: bool = True,
    executors: Any = None,
    globals_: Mapping[str, Any] | None = None,
    fast: bool = False,
    for_nodes: bool = False,
    on_progress: Callable[[Diagnosis], None] | None = None,
) -> Diagnosis:
    """Diagnose one object; :class:`Doctor` is quicker for several.

    Parameters
    ----------
    value : object
        Anything: a function, a class, an object.
    name : str
        How the diagnosis calls it.
    round_trip : bool
        Send it through a clean second interpreter.
    executors : SparkSession, optional
        Send it through this session's executors, too.
    globals_ : mapping of str to object, optional
        The notebook's globals; those of ``__main__`` by default.
    fast : bool
        Only what can be said at once: no second interpreter, no executors.
    for_nodes : bool
        As our nodes are sent it, by ``%%tfos_train``, and not as by one of Spark's ordinary jobs.
    on_progress : callable(Diagnosis), optional
        Given what is known so far, when others have been asked whose answer takes seconds.

    Returns
    -------
    Diagnosis

    Raises
    ------
    SessionError
        PySpark is not installed, and it is PySpark's pickling that was asked for; or the executors do not answer.
    """
    with Doctor(globals_) as doctor:
        return doctor.examine(
            value,
            name,
            round_trip=round_trip,
            executors=executors,
            fast=fast,
            for_nodes=for_nodes,
            on_progress=on_progress,
        )
