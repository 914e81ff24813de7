"""Modules, which travel by name: whether the other side has them, and has the same.

Runs on: driver.
"""

from __future__ import annotations

import importlib.machinery
import os
import site
import sys
import sysconfig
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tfos_magic.doctor import code, names
from tfos_magic.doctor.case import Case, is_local_module
from tfos_magic.doctor.findings import Finding, Verdict
from tfos_magic.doctor.graph import Node

_PLAIN = (str, bytes, int, float, bool, type(None))


def look(case: Case) -> Iterator[Finding]:
    """Yield what is known of the modules that the object needs."""
    missing = set(_missing(case))
    in_vain = list(_registered_in_vain(case, missing))
    yield from in_vain
    for module in sorted(missing):
        finding = _driver_only(case, module)
        if finding.path not in [each.path for each in in_vain]:
            yield finding
    yield from _patched(case)
    yield from _set_by_notebook(case)
    stale = dict(_stale(case, missing))
    yield from stale.values()
    known = {module for module, finding in stale.items() if finding.verdict is not Verdict.FINE}
    yield from _differs(case, missing | known)


# --- not there ---------------------------------------------------------------------------------------------


def _missing(case: Case) -> Iterator[str]:
    for module in names.needed_modules(case.graph):
        if not case.facts:
            is_missing = not _is_found_elsewhere(module) and not _is_shipped(case, module)
        else:
            is_missing = case.facts.get("modules", {}).get(module, "") is None
        if is_missing or (not case.is_on_this_machine and is_local_module(module) and not _is_shipped(case, module)):
            yield module
    error = case.facts.get("error") or {}
    if error.get("module"):
        yield str(error["module"]).partition(".")[0]


def _is_found_elsewhere(name: str) -> bool:
    """Tell whether a clean interpreter of this installation, started here, would find a module."""
    module = sys.modules.get(name)
    if module is None or name in sys.builtin_module_names:
        return True
    if getattr(module, "__spec__", None) is None and getattr(module, "__file__", None) is None:
        return False
    if not is_local_module(name):
        return getattr(module, "__spec__", None) is not None
    path = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep), *site.getsitepackages()]
    path += [sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    if importlib.machinery.PathFinder.find_spec(name, [each for each in path if each]) is not None:
        return True
    finders = [finder for finder in sys.meta_path if "editable" in repr(finder).lower()]
    return any(finder.find_spec(name, None) is not None for finder in finders)


def _is_shipped(case: Case, module: str) -> bool:
    """Tell whether it was given to ``sc.addPyFile`` or ``--py-files``; of archives, whether there are any."""
    folder = case.added_files
    return folder is not None and ((folder / f"{module}.py").exists() or bool(case.spark._python_includes))


def _driver_only(case: Case, module: str) -> Finding:
    file = str(getattr(sys.modules.get(module), "__file__", None) or "")
    why = f"It is pickled as a name of the module {module}, which executors do not have."
    if not file:
        why += " On the driver it exists in memory only."
        fix = "Write the module to a file, and sc.addPyFile(path)."
    else:
        why += f" The driver has it at {file}." if case.is_on_this_machine else _nobody_has_sent(file)
        fix = _send(file, module)
    if case.is_nodes and file:
        fix += f"; or import cloudpickle; cloudpickle.register_pickle_by_value({module})"
    return case.finding(_first_of(case, module), "driver-only-module", Verdict.BREAKS, why, fix)


def _nobody_has_sent(file: str) -> str:
    return f" It is a file of the driver's, {file}, that nobody has sent to them (--executors asks them)."


def _send(file: str, module: str) -> str:
    if Path(file).name != "__init__.py":
        return f"sc.addPyFile({file!r})"
    folder = str(Path(file).parents[1])
    return f"import shutil; sc.addPyFile(shutil.make_archive({module!r}, 'zip', {folder!r}, {module!r}))"


def _first_of(case: Case, module: str) -> Node:
    """Return the first object that travels as a name of `module`."""
    for node in case.graph:
        home = node.how.removeprefix("by import of ") if not node.is_by_value else type(node.value).__module__
        if home == module or home.startswith(f"{module}."):
            return node
    return case.graph.root


# --- registered with the wrong cloudpickle -----------------------------------------------------------------


def _registered_in_vain(case: Case, missing: set[str]) -> Iterator[Finding]:
    """Pip's ``cloudpickle.register_pickle_by_value`` says nothing to PySpark's."""
    if case.is_nodes:
        return
    pips = _registry("cloudpickle.cloudpickle") - _registry("pyspark.cloudpickle.cloudpickle")
    for module in sorted(pips):
        node = _first_of(case, module)
        if node is not case.graph.root or node.how == f"by import of {module}":
            why = (
                f"{module} is registered with pip's cloudpickle, and Spark has its own, pyspark.cloudpickle: "
                f"it travels by name all the same."
            )
            fix = f"from pyspark import cloudpickle; cloudpickle.register_pickle_by_value({module})"
            verdict = Verdict.BREAKS if module.partition(".")[0] in missing else Verdict.WRONG
            yield case.finding(node, "registered-in-vain", verdict, why, fix)


def _registry(module: str) -> set[str]:
    return set(getattr(sys.modules.get(module), "_PICKLE_BY_VALUE_MODULES", ()))


# --- not the same ------------------------------------------------------------------------------------------


def _patched(case: Case) -> Iterator[Finding]:
    """Functions of the notebook that were put into a module: the other side has the module's own."""
    for node, function in case.graph.functions:
        known = code.captured(function)
        for name, chain in dict.fromkeys(code.attribute_chains(function)):
            for length in range(1, len(chain) + 1):
                module = known.get(name)
                found = code.resolve(module, chain[:length])
                if isinstance(module, types.ModuleType) and _is_mains(found):
                    dotted = ".".join((module.__name__, *chain[:length]))
                    why = f"{dotted} was replaced by a function of the notebook; executors have the module's own."
                    fix = f"Call {found.__name__} by its own name, not through the module."
                    path = (*node.path, code.step_to(function, name), *(f"attribute {each}" for each in chain[:length]))
                    yield case.finding(path, "patched-module", Verdict.WRONG, why, fix)


def _is_mains(found: Any) -> bool:
    return isinstance(found, types.FunctionType | type) and found.__module__ == "__main__"


def _differs(case: Case, missing: set[str]) -> Iterator[Finding]:
    """Find code that an import there would give otherwise: it was edited, and not reloaded here or not there."""
    said = case.facts.get("names") or {}
    for item in names.comparable_names(case.graph):
        there = said.get(item.key)
        if not there or there == item.fingerprint or item.module.partition(".")[0] in missing:
            continue
        if case.executor:
            why = f"{case.executor} runs another {item.name} than the driver: it keeps what it imported first."
            fix = "Stop the session and start a new one, or move the code into the notebook while it changes."
        else:
            why = f"The driver runs another {item.name} than an import of {item.module} gives: it was edited since."
            fix = f"import importlib; importlib.reload({item.module}), and run the cells that import from it again."
        yield case.finding(item.path, "stale-module", Verdict.WRONG, why, fix)


def _set_by_notebook(case: Case) -> Iterator[Finding]:
    """Find plain values of the user's modules that are not what the source says: executors import the source."""
    for node, function in case.graph.functions:
        known = code.captured(function)
        for name, chain in dict.fromkeys(code.attribute_chains(function)):
            module = known.get(name)
            if not isinstance(module, types.ModuleType) or not is_local_module(module.__name__):
                continue
            written = code.written_value(module, chain[0])
            value = code.resolve(module, chain[:1])
            if written and type(value) in _PLAIN and not (type(written[0]) is type(value) and written[0] == value):
                dotted = f"{module.__name__}.{chain[0]}"
                why = (
                    f"The notebook has set {dotted}; executors import {module.__name__} and have what its source says."
                )
                fix = f"Pass the value to the function as an argument, or set {dotted} inside the function."
                path = (*node.path, code.step_to(function, name), f"attribute {chain[0]}")
                yield case.finding(path, "module-state", Verdict.WRONG, why, fix)


def _stale(case: Case, missing: set[str]) -> Iterator[tuple[str, Finding]]:
    """Find files that were edited: executors keep what they imported first, and what addPyFile has given them."""
    if case.spark is None or case.is_nodes:
        return
    for module in names.needed_modules(case.graph):
        if module in missing or not is_local_module(module):
            continue
        file = Path(str(sys.modules[module].__file__))
        old = _added_copy(case, file)
        if old is not None:
            why = f"{file.name} was edited after sc.addPyFile; executors keep the first, also when it is added again."
            fix = "Copy it to another name and import that, or stop the session and start a new one."
            yield module, case.finding(_first_of(case, module), "stale-module", Verdict.WRONG, why, fix)
        elif file.suffix == ".py" and file.stat().st_mtime > getattr(case.spark, "startTime", float("inf")) / 1000:
            edited = time.strftime("%H:%M", time.localtime(file.stat().st_mtime))
            why = f"{file.name} was edited at {edited}, after Spark started: Python workers that know it keep the old."
            fix = "If it was in use before that: --executors tells; a new session has the new one."
            yield module, case.finding(_first_of(case, module), "stale-module", Verdict.FINE, why, fix)


def _added_copy(case: Case, file: Path) -> Path | None:
    """Return the copy that ``addPyFile`` has made of a file, where it says something else."""
    folder = case.added_files
    copy = folder / file.name if folder is not None else None
    if copy is None or not copy.exists() or copy == file or copy.read_bytes() == file.read_bytes():
        return None
    return copy
