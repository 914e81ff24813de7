"""What stands behind ``%tfos_doctor``: one doctor for the notebook, kept from question to question.

Whatever is to be shipped to nodes gets a quick look as well.

Runs on: notebook.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from tfos_magic import arguments
from tfos_magic.arguments import DoctorLine
from tfos_magic.arguments.words import short
from tfos_magic.cell import CellFunction
from tfos_magic.errors import ShippingError, UsageError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from tfos_magic.doctor import Diagnosis, Doctor
    from tfos_magic.notebook import Notebook

# Shipping measures every object itself; and nodes import modules before all else, and name the one that is missing.
_TOLD_ELSEWHERE = frozenset({"large-capture", "driver-only-module"})


class DiagnosisOutput:
    """Where a diagnosis is shown: first what is known at once, if the rest takes long, then all of it in its place.

    Parameters
    ----------
    shell : InteractiveShell
        One with a ``kernel`` has outputs that can be replaced; another is told in a line what is waited for.
    services : Services
        ``doctor`` and ``widgets`` of them.
    """

    def __init__(self, shell: InteractiveShell, services: Any) -> None:
        self._shell = shell
        self._services = services
        self._display_id = uuid.uuid4().hex
        self._shown: Diagnosis | None = None

    def __enter__(self) -> DiagnosisOutput:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        # What stays in the notebook does not wait any more.
        if kind is not None and self._shown is not None and self._shown.awaits:
            why = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
            trip = self._services.doctor.Trip(self._shown.awaits, "not asked", why)
            self.show(dataclasses.replace(self._shown, awaits="", trip=trip))

    def show(self, diagnosis: Diagnosis) -> None:
        """Show a diagnosis in place of the one before."""
        if hasattr(self._shell, "kernel"):
            self._publish(diagnosis, display_id=self._display_id, update=self._shown is not None)
        elif diagnosis.awaits:
            print(f"asking {diagnosis.awaits} …", flush=True)
            return
        else:
            self._publish(diagnosis)
        self._shown = diagnosis

    def _publish(self, diagnosis: Diagnosis, *, display_id: str = "", update: bool = False) -> None:
        widgets = self._services.widgets
        bundle = widgets.diagnosis.bundle(diagnosis)
        widgets.publish(self._shell.display_pub, bundle, display_id=display_id, update=update)


class DoctorMagic:
    """Examines what the line asks for, and shows the diagnosis.

    Parameters
    ----------
    shell : InteractiveShell
    notebook : Notebook
    services : Services
        ``doctor``, ``session`` and ``widgets`` of them.
    """

    def __init__(self, shell: InteractiveShell, notebook: Notebook, services: Any) -> None:
        self._shell = shell
        self._notebook = notebook
        self._services = services
        self._doctor: Doctor | None = None

    def close(self) -> None:
        """End the doctor's second interpreter, if there is one."""
        if self._doctor is not None:
            self._doctor.close()
            self._doctor = None

    def run(self, line: str, cell: str | None) -> None:
        """Do what ``%tfos_doctor line``, or ``%%tfos_doctor line`` above `cell`, asks for."""
        wanted = arguments.parse_doctor(line, self._notebook.namespace, has_cell=cell is not None)
        if cell is not None and not cell.strip():
            raise UsageError("The cell is empty: what should be examined?")
        executors = self._session(wanted)
        doctor = self._kept()
        with DiagnosisOutput(self._shell, self._services) as output:
            asked: dict[str, Any] = {"executors": executors, "on_progress": output.show}
            if cell is None:
                diagnosis = doctor.examine(wanted.value, short(wanted.expression), **asked)
            else:
                diagnosis = doctor.examine_cell(self._notebook.cell_function(cell), **asked)
            if wanted.out:
                self._notebook.namespace[wanted.out] = diagnosis
            output.show(diagnosis)

    def check(self, function: Callable[..., Any], left_out: Collection[str] = ()) -> list[str]:
        """Have a quick look at what nodes are to run; return what would be silently wrong there, or costly.

        Parameters
        ----------
        function : callable
            That pickles: see :func:`tfos_magic.shipping.pack`.
        left_out : collection of str
            Names that it takes from the notebook and that do not travel.

        Raises
        ------
        ShippingError
            It pickles, and yet something would break on the nodes.
        """
        doctor = self._kept()
        if isinstance(function, CellFunction):
            diagnosis = doctor.examine_cell(function, fast=True)
        else:
            name = getattr(function, "__name__", type(function).__name__)
            diagnosis = doctor.examine(function, name, fast=True, for_nodes=True)
        stays = {f"global {name}" for name in left_out}
        found = [each for each in diagnosis.findings if each.trap not in _TOLD_ELSEWHERE and not stays & {*each.path}]
        for finding in found:
            if finding.verdict is self._services.doctor.Verdict.BREAKS:
                where = finding.words
                raise ShippingError(f"{where}: this breaks on a node.", path=where, cause=finding.why, hint=finding.fix)
        return [f"{each.words}: {each.verdict.word}. {each.why} {each.fix}" for each in found if each.verdict]

    def _kept(self) -> Doctor:
        if self._doctor is None:
            self._doctor = self._services.doctor.Doctor(self._notebook.namespace)
        return self._doctor

    def _session(self, wanted: DoctorLine) -> Any:
        if not wanted.asks_executors:
            return None
        found = self._services.session.find_session(self._notebook.namespace, wanted.session)
        if found is None:
            raise UsageError(
                "--executors: there is no Spark session in the notebook.",
                hint="Without --executors a clean second interpreter of this machine is asked.",
            )
        return found
