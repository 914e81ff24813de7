"""What stands behind ``%tfos_doctor``: one doctor for the notebook, kept from question to question.

Runs on: notebook.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tfos_magic import arguments
from tfos_magic.arguments import DoctorLine
from tfos_magic.arguments.words import short
from tfos_magic.errors import UsageError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from tfos_magic.doctor import Doctor
    from tfos_magic.notebook import Notebook


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
        if self._doctor is None:
            self._doctor = self._services.doctor.Doctor(self._notebook.namespace)
        if cell is None:
            name = short(wanted.expression)
            diagnosis = self._doctor.examine(wanted.value, name, executors=executors)
        else:
            diagnosis = self._doctor.examine_cell(self._notebook.cell_function(cell), executors=executors)
        if wanted.out:
            self._notebook.namespace[wanted.out] = diagnosis
        self._shell.display_pub.publish(data=self._services.widgets.diagnosis.bundle(diagnosis), metadata={})

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
