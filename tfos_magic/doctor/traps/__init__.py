"""The traps: one module for each family, each with a ``look(case)`` that yields findings.

Runs on: driver. A trap sees the traced object, and what the second interpreter said where it was asked; it runs no code
of the user's.

==============  ========================================================================================
module          traps
==============  ========================================================================================
handles         lock, thread, open-file, generator, socket, … (`tfos_magic.obstacles`), drags-self,
                singledispatch, cached-property, lru-cache, new-type, by-name-in-main, unpicklable, too-deep
classes         class-leak-back, class-in-task, class-defined-again, lost-slots, lost-identity
functions       late-binding, mutated-global
streams         captured-rng, captured-iterator
modules         driver-only-module, registered-in-vain, patched-module, module-state, stale-module
tensorflow      keras-main-layer, tf-function-no-source
spark           broadcast-plain-pickle, frozen-globals, rows-of-namedtuples
errors          exception-init
sizes           large-capture
==============  ========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tfos_magic.doctor import namedtuples
from tfos_magic.doctor.case import Case
from tfos_magic.doctor.findings import Finding
from tfos_magic.doctor.traps import classes, errors, functions, handles, modules, sizes, spark, streams, tensorflow

_FAMILIES: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    handles.look,
    classes.look,
    functions.look,
    streams.look,
    modules.look,
    tensorflow.look,
    spark.look,
    errors.look,
    sizes.look,
    namedtuples.look,
)


def look(case: Case) -> Iterator[Finding]:
    """Yield what every family finds."""
    for family in _FAMILIES:
        yield from family(case)
