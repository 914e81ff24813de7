"""The magics: parse the line, call one function, display the result.

Runs on: notebook. With ``notebook`` and ``widgets`` the only module that knows IPython.

    %load_ext tfos_magic ──► load(shell) ──► Extension     owns all that is put into the shell; takes it back
    %%tfos_train line, cell          %%tfos_infer line, cell
        │ arguments.parse_…              the line, checked
        ▼ notebook.cell_function         the cell, as a function
        ▼ shipping.pack                  function and args, as bytes; or what is wrong with them
        ▼ session                        the notebook's Spark, or a local one
        ▼ cluster.run                    inference.Inference      both inside widgets.LiveBoard
    RunResult ──► --out NAME         DataFrame ──► --out NAME     its nodes stand until %tfos_stop
                  or the cell's value
    --background: background.BackgroundRun at once, and all that follows beside the notebook
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from IPython.core.completer import SimpleCompletion, context_matcher
from IPython.core.magic import no_var_expand

import tfos_magic
from tfos_magic import arguments, completion, dry_run, shipping
from tfos_magic.arguments import HelpRequestedError, InferLine, Line, TrainLine
from tfos_magic.cell import CellFunction, has_trailing_semicolon
from tfos_magic.doctor_magic import DoctorMagic
from tfos_magic.errors import RunInterrupted, TfosError, UsageError
from tfos_magic.notebook import Notebook
from tfos_magic.runs_magic import RunsMagic, count_nodes, raise_errors, tell_errors
from tfos_magic.standing import StandingInferences
from tfos_magic.status import RunPlanned, StatusBoard
from tfos_magic.tensorboard_magic import TensorBoardMagic

if TYPE_CHECKING:
    from IPython.core.completer import CompletionContext, SimpleMatcherResult
    from IPython.core.interactiveshell import InteractiveShell

    from tfos_magic.cluster import RunOptions
    from tfos_magic.namedtuple_jobs import CleanJobs
    from tfos_magic.namedtuple_session import SessionStatus
    from tfos_magic.result import NodeInfo, RunResult
    from tfos_magic.scalars import ScalarLog
    from tfos_magic.shipping import Payload

_MAGICS = {
    "tfos_train": "line_cell",
    "tfos_infer": "line_cell",
    "tfos_doctor": "line_cell",
    "tfos_logs": "line",
    "tfos_status": "line",
    "tfos_stop": "line",
    "tfos_namedtuple": "line",
}
_SERVICES = frozenset(
    {
        "cluster",
        "doctor",
        "inference",
        "namedtuple_jobs",
        "namedtuple_patch",
        "namedtuple_session",
        "scalars",
        "session",
        "tensorboard_server",
        "widgets",
    }
)
_TENSORFLOW = ("tensorflow", "tensorflow-cpu", "tf-nightly", "tensorflow-macos", "tensorflow-intel")


def load(shell: InteractiveShell, services: Services | None = None) -> None:
    """Put the magics into `shell`, take PySpark's namedtuple patch out, and print one line of what is ready."""
    unload(shell)
    Extension(shell, services or Services()).load()


def unload(shell: InteractiveShell) -> None:
    """Take everything back that :func:`load` has put into `shell`; does nothing when nothing is there."""
    magic = shell.magics_manager.magics["cell"].get("tfos_train")
    owner = getattr(magic, "__self__", None)
    if isinstance(owner, Extension):
        owner.unload()


class Services:
    """The modules behind the magics, imported when they are first needed; tests give their own."""

    def __getattr__(self, name: str) -> ModuleType:
        if name not in _SERVICES:
            raise AttributeError(name)
        return importlib.import_module(f"tfos_magic.{name}")


class Extension:
    """All that is put into one shell, and what goes on in it beside the cells: runs, and inferences that stand.

    Parameters
    ----------
    shell : InteractiveShell
    services : Services
    """

    def __init__(self, shell: InteractiveShell, services: Services) -> None:
        self._shell = shell
        self._services = services
        self._notebook = Notebook(shell)
        self._standing = StandingInferences()
        self._runs = RunsMagic(shell, services, self._standing)
        self._clean_jobs: CleanJobs = services.namedtuple_jobs.CleanJobs()
        self._doctor = DoctorMagic(shell, self._notebook, services)
        self._tensorboard = TensorBoardMagic(shell, services)

    # --- coming and going ---

    def load(self) -> None:
        """Register everything and say what is ready."""
        report = self._services.namedtuple_patch.revert()
        self._clean_jobs.start()
        for name, kind in _MAGICS.items():
            self._shell.register_magic_function(getattr(self, name), kind, name)
        self._shell.input_transformers_cleanup.append(give_help_a_body)
        if self._shell.Completer is not None:
            self._shell.Completer.custom_matchers.append(self.match)
        print(f"tfos_magic {tfos_magic.__version__}: {_versions()}; {report.summary}; {self._describe_session()}")

    def unload(self) -> None:
        """Take back what :meth:`load` did, and end what goes on."""
        manager = self._shell.magics_manager
        for name in _MAGICS:
            manager.magics["line"].pop(name, None)
            manager.magics["cell"].pop(name, None)
            with contextlib.suppress(AttributeError):
                delattr(manager.user_magics, name)
        with contextlib.suppress(ValueError):
            self._shell.input_transformers_cleanup.remove(give_help_a_body)
        if self._shell.Completer is not None:
            with contextlib.suppress(ValueError):
                self._shell.Completer.custom_matchers.remove(self.match)
        self._doctor.close()
        self._clean_jobs.close()
        self._services.namedtuple_patch.restore()
        self._runs.stop_all()
        self._tensorboard.close()
        if contexts := self._clean_jobs.touched():
            for problem in self._services.namedtuple_session.restore_workers(contexts):
                print(f"The namedtuple patch could not be put back in all Python workers. {problem}", file=sys.stderr)

    def _describe_session(self) -> str:
        if "pyspark" not in sys.modules:
            return "no Spark session yet"
        try:
            found = self._services.session.find_session(self._notebook.namespace)
        except TfosError as error:
            return error.fact
        if found is None:
            return "no Spark session yet"
        context = getattr(found, "sparkContext", found)
        return f"Spark session on {getattr(context, 'master', 'Spark Connect')}"

    # --- the magics ---

    @no_var_expand
    def tfos_train(self, line: str, cell: str | None = None) -> Any:
        """Train on executors; the parser's help text takes this one's place."""
        with _help_on_request():
            if cell is None and not line.strip():
                raise HelpRequestedError(arguments.train_parser().format_help())
            return self._train(arguments.parse_train(line, self._notebook.namespace), cell)

    tfos_train.__doc__ = arguments.train_parser().format_help()

    @no_var_expand
    def tfos_infer(self, line: str, cell: str | None = None) -> None:
        """Predict on executors; the parser's help text takes this one's place."""
        with _help_on_request():
            if cell is None and not line.strip():
                raise HelpRequestedError(arguments.infer_parser().format_help())
            self._infer(arguments.parse_infer(line, self._notebook.namespace), cell)

    tfos_infer.__doc__ = arguments.infer_parser().format_help()

    @no_var_expand
    def tfos_stop(self, line: str) -> None:
        """End what goes on beside the cells: background runs, and nodes that wait for questions; one, or all.

        %tfos_stop [NAME]

        NAME of a run is that of %%tfos_train --background --out, or the one it got (run1). Its wait() and result() say
        that it was stopped. NAME of a DataFrame is that of %%tfos_infer --out. It cannot be computed again after that;
        what has been computed from it stays.
        Nodes also end with %unload_ext tfos_magic, with the kernel, and when %%tfos_infer --out gives the same NAME to
        another DataFrame.
        """
        with _help_on_request():
            words = _words(line, self.tfos_stop)
            self._runs.stop(words)

    @no_var_expand
    def tfos_status(self, line: str) -> None:
        """Show the boards of this notebook's runs, and which nodes wait for questions; of all, or of one.

        %tfos_status [NAME]

        NAME is that of --out, or the one that the run got (run1). The board of a run that goes on in the background is
        live; the one in the run's own cell goes on as well. Of the runs that have ended the last three are kept.
        """
        with _help_on_request():
            words = _words(line, self.tfos_status)
            self._runs.show(words)

    @no_var_expand
    def tfos_logs(self, line: str) -> None:
        """Print what nodes wrote; the parser's help text takes this one's place."""
        with _help_on_request():
            self._runs.print_logs(line, self._notebook.namespace)

    tfos_logs.__doc__ = arguments.logs_parser().format_help()

    @no_var_expand
    def tfos_namedtuple(self, line: str) -> None:
        """Say where PySpark's namedtuple patch is on, take it out, or put it back.

        %tfos_namedtuple [status | revert | restore] [--driver] [--out NAME]

        In the driver and, where there is a Spark session, in its executors' Python workers: they are asked with short
        Spark jobs. --driver leaves Spark alone. %load_ext tfos_magic has reverted the driver, and from then on each
        Spark job reverts its workers, before anything of it is unpickled there; revert does so at once. restore puts
        everything back as PySpark had it, and lets jobs run as they are. NAME is bound to the same facts as an object.
        """
        with _help_on_request():
            words = _words(line, self.tfos_namedtuple)
            wanted = arguments.parse_namedtuple(words)
            if wanted.is_driver_only:
                status = getattr(self._services.namedtuple_patch, wanted.action)()
                print(status.summary)
            else:
                status = self._ask_session(wanted.action)
                widgets = self._services.widgets
                widgets.publish(self._shell.display_pub, widgets.namedtuple_table.bundle(status))
            if wanted.out:
                self._notebook.namespace[wanted.out] = status

    def _ask_session(self, action: str) -> SessionStatus:
        """Do it in all processes, and return the state afterwards."""
        options: dict[str, Any] = {"jobs": self._clean_jobs, "nodes": self._running_nodes()}
        problem = ""
        try:
            options["spark"] = self._services.session.find_session(self._notebook.namespace)
        except TfosError as error:
            problem = f"{error.fact} Only the driver was asked: Python workers are out of reach from here."
        service = self._services.namedtuple_session
        act = {"status": service.survey, "revert": service.revert, "restore": service.restore}[action]
        status: SessionStatus = act(**options)
        return dataclasses.replace(status, notes=(*status.notes, problem)) if problem else status

    def _running_nodes(self) -> list[NodeInfo]:
        """Return the nodes of inferences that stand, and of the notebook's TFClusters."""
        clusters = [value for value in self._notebook.namespace.values() if type(value).__name__ == "TFCluster"]
        nodes = [node for cluster in clusters for node in getattr(cluster, "nodes", ())]
        return [*self._standing.nodes, *{node.pid: node for node in nodes}.values()]

    @no_var_expand
    def tfos_doctor(self, line: str, cell: str | None = None) -> None:
        """Diagnose; the parser's help text takes this one's place."""
        with _help_on_request():
            if cell is None and not line.strip():
                raise HelpRequestedError(arguments.doctor_parser().format_help())
            self._doctor.run(line, cell)

    tfos_doctor.__doc__ = arguments.doctor_parser().format_help()

    @context_matcher()  # type: ignore[untyped-decorator]  # IPython's
    def match(self, context: CompletionContext) -> SimpleMatcherResult:
        """Complete options and names on the lines of our magics."""
        found = completion.choices(
            context.text_until_cursor,
            context.token,
            self._notebook.namespace,
            standing=self._runs.stoppable,
            runs=self._runs.nodes_of_runs,
        )
        completions = [
            SimpleCompletion(text, type="param" if text.startswith("-") else "instance") for text in found or ()
        ]
        return cast("SimpleMatcherResult", {"completions": completions, "suppress": bool(found)})

    # --- training ---

    def _train(self, wanted: TrainLine, cell: str | None) -> Any:
        self._runs.require_free(wanted.out, is_background=wanted.is_background)
        function = self._function(wanted, cell)
        # A body knows nothing of parameter servers: they serve, and the chief runs it. A function of (args, ctx)
        # follows TensorFlowOnSpark, and looks at ctx.job_name itself.
        is_body = isinstance(function, CellFunction) and function.entry is None
        serves_itself = not (wanted.ps and wanted.chief and is_body)
        planned = self._plan(
            wanted,
            function,
            num_ps=wanted.ps,
            serves_itself=serves_itself,
            waits_for_all=not wanted.is_independent,
        )
        if planned is None:
            return None
        try:
            result = self._run(wanted, *planned)
        except (TfosError, RunInterrupted) as error:
            self._keep_what_is_done(error, wanted.out)
            raise
        if wanted.out:
            self._notebook.namespace[wanted.out] = result
        # A handle is worth having under any circumstances, and is a line; its board stands above it.
        is_silent = not wanted.is_background and (wanted.out or wanted.is_quiet)
        return None if is_silent or has_trailing_semicolon(cell or "") else result

    def _keep_what_is_done(self, error: TfosError | RunInterrupted, out: str | None) -> None:
        """Give the user the points of a grid that were done before it ended early, and say where they are."""
        if error.partial is None:
            return
        if out:
            self._notebook.namespace[out] = error.partial
        done = len(error.partial.nodes) - len(error.partial.missing)
        points = "point that is" if done == 1 else f"{done} points that are"
        where = out or "sys.last_value.partial"
        told = f"{where} has the values of the {points} done; {where}.missing says why others have none."
        if isinstance(error, TfosError):
            error.add_hint(told)
        else:
            error.args = ("\n".join([str(error), told]),)

    def _run(self, wanted: TrainLine, payload: Payload, options: RunOptions) -> Any:
        """Return the result, or the handle of a run in the background."""
        frames = {"train": wanted.data, "validation": wanted.validation}
        data = {name: frame for name, frame in frames.items() if frame is not None}
        spark = self._session(wanted)
        cell_names = self._notebook.cell_names(payload)
        name = self._runs.runs.name_for(wanted.out)
        if wanted.is_background:
            options = dataclasses.replace(options, title=f"{name}: {options.title}")
            self._services.cluster.check(spark, options, data)
        board = _board(options)
        run = functools.partial(
            self._services.cluster.run, spark, payload, options, data=data, board=board, cell_names=cell_names
        )
        if wanted.tensorboard_dir is not None:
            run = functools.partial(_logged, run, self._tensorboard.begin(wanted.tensorboard_dir, name, board))
        if wanted.is_background:
            return self._runs.start(name, board, lambda stop: run(stop=stop), quiet=wanted.is_quiet)
        with (
            self._runs.runs.recorded(name, board),
            self._services.widgets.LiveBoard(board, self._shell, quiet=wanted.is_quiet),
        ):
            return run()

    # --- inference ---

    def _infer(self, wanted: InferLine, cell: str | None) -> None:
        function = self._function(wanted, cell, predicts=True)
        planned = self._plan(wanted, function, chief=False, predicts=True)
        if planned is None:
            return
        self._make_place(wanted)
        self._notebook.namespace[wanted.out] = self._predict(wanted, *planned)
        if wanted.save is None:
            waits, them = ("waits", "it") if wanted.executors == 1 else ("wait", "them")
            what = f"{count_nodes(wanted.executors)} {waits} for questions"
            print(f"{wanted.out} is ready: {what}; %tfos_stop {wanted.out} ends {them}.")
        else:
            print(f"{wanted.out} is saved, and read from {wanted.save}; the nodes have ended.")

    def _make_place(self, wanted: InferLine) -> None:
        """End the nodes of the DataFrame that has had the name so far: their slots are needed."""
        self._runs.require_free(wanted.out)
        before = self._standing.find(wanted.out)
        if before is not None and before.frame is wanted.data:
            raise UsageError(
                f"--out {wanted.out}: it is --data too, and its nodes end when the name goes to another DataFrame.",
                hint="Choose another name for the result, or --save the first DataFrame.",
            )
        stopped = self._standing.stop([wanted.out])
        raise_errors([each for each in stopped if isinstance(each.error, KeyboardInterrupt)])
        tell_errors(stopped)

    def _predict(self, wanted: InferLine, payload: Payload, options: RunOptions) -> Any:
        """Return the DataFrame: lazy, its nodes standing; or the saved one."""
        spark = self._session(wanted)
        board = _board(options)
        is_lasting = wanted.save is None
        try:
            with self._services.widgets.LiveBoard(board, self._shell, quiet=wanted.is_quiet, lasting=is_lasting):
                inference = self._services.inference.Inference(
                    spark,
                    payload,
                    options,
                    wanted.data,
                    schema=wanted.schema,
                    keep=wanted.keep,
                    on_event=board.apply,
                    cell_names=self._notebook.cell_names(payload),
                )
                self._standing.add(wanted.out, inference, wanted.executors)
                return inference.frame if wanted.save is None else inference.save(wanted.save, wanted.mode)
        except BaseException:  # an interrupt may come at any time, also when all was ready
            self._standing.stop([wanted.out])
            raise

    # --- what both have ---

    def _function(self, wanted: Line, cell: str | None, *, predicts: bool = False) -> Callable[..., Any]:
        """Return what is to run: the cell, or else something by its name."""
        if cell is not None:
            if wanted.function is not None:
                raise UsageError(f"Unexpected {wanted.function!r}: with a cell, the cell is the function.")
            if not cell.strip():
                raise UsageError("The cell is empty: what should the nodes run?")
            return self._notebook.cell_function(cell, predicts=predicts)
        if wanted.function is None:
            what = "a function or of a Keras model" if predicts else "a function of (args, ctx)"
            magic = "%%tfos_infer" if predicts else "%%tfos_train"
            raise UsageError(f"Nothing to run: give the name of {what}, or write {magic} above a cell.")
        if predicts:
            return self._notebook.named_predictor(wanted.function)
        return self._notebook.named_function(wanted.function)

    def _plan(self, wanted: Line, function: Callable[..., Any], **more: Any) -> tuple[Payload, RunOptions] | None:
        """Return what is to run and how; None for a dry run, which is shown instead."""
        points = wanted.grid if isinstance(wanted, TrainLine) else None
        payload = shipping.pack(function, args=_args(wanted), grid=points)
        options = self._options(wanted, payload, **more)
        for warning in (*payload.warnings, *self._doctor.check(function, payload.left_out)):
            print(f"warning: {warning}", file=sys.stderr)
        if not wanted.is_dry_run:
            return payload, options
        told = dry_run.describe(payload, wanted.executors, points)
        print("\n".join([*told, "", *self._describe_plan(wanted, options)]))
        return None

    def _options(self, wanted: Line, payload: Payload, **more: Any) -> RunOptions:
        kind = self._services.cluster.RunOptions
        known = {field.name for field in dataclasses.fields(kind)}
        options: RunOptions = kind(
            **{
                **{name: value for name, value in vars(wanted).items() if name in known},
                "num_nodes": wanted.executors,
                "preload": self._services.cluster.modules_to_preload(payload),
                "title": f"{wanted.function or self._notebook.label} on {count_nodes(wanted.executors)}",
                **more,
            }
        )
        return options

    def _session(self, wanted: Line) -> Any:
        found = self._services.session.find_session(self._notebook.namespace, wanted.session)
        if found is not None:
            return found
        slots = _local_slots(wanted)
        print(f"No Spark session in the notebook: starting a local one with {slots} slots (local[{slots}]).")
        return self._services.session.local_session(slots)

    def _describe_plan(self, wanted: Line, options: RunOptions) -> list[str]:
        found = self._services.session.find_session(self._notebook.namespace, wanted.session)
        if found is None:
            slots = _local_slots(wanted)
            return [f"No Spark session in the notebook: a local one would start with {slots} slots (local[{slots}])."]
        plan: list[str] = self._services.cluster.plan(found, options)
        return plan


def give_help_a_body(lines: list[str]) -> list[str]:
    """Let ``%%tfos_train --help`` run without a cell: IPython refuses cell magics whose body is empty."""
    if len(lines) == 1 and lines[0].startswith("%%tfos_") and not lines[0].rstrip().endswith("?"):
        return [lines[0].rstrip("\n") + "\n", "\n"]
    return lines


# Without this a terminal would ask this function whether the cell is complete, and never wait for its second line.
give_help_a_body.has_side_effects = True  # type: ignore[attr-defined]  # IPython asks the function


def _logged(run: Callable[..., RunResult], log: ScalarLog, **options: Any) -> RunResult:
    """Run with all events in the log."""
    with log:
        return run(on_event=log.take, **options)


def _words(line: str, magic: Callable[..., Any]) -> list[str]:
    """Return the words of a line without a parser; the magic's docstring is the help it may ask for."""
    words = arguments.split(line)
    if "--help" in words or "-h" in words:
        raise HelpRequestedError(inspect.getdoc(magic))
    return words


@contextlib.contextmanager
def _help_on_request() -> Iterator[None]:
    """Print the help text where the line asks for it."""
    try:
        yield
    except HelpRequestedError as request:
        print(request)


def _board(options: RunOptions) -> StatusBoard:
    """Return a board that has its title from the first frame on."""
    board = StatusBoard()
    board.apply(RunPlanned(options.title, ()))
    return board


def _versions() -> str:
    tensorflow = next(filter(None, map(_version, _TENSORFLOW)), "missing")
    return f"TensorFlow {tensorflow}, PySpark {_version('pyspark') or 'missing'}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _args(wanted: Line) -> argparse.Namespace:
    """Return what the function gets as ``args``: the options, then ``--args``, which may override them."""
    return argparse.Namespace(**{**{name: getattr(wanted, name) for name in wanted.FOR_ARGS}, **(wanted.args or {})})


def _local_slots(wanted: Line) -> int:
    if isinstance(wanted, TrainLine) and wanted.is_independent:
        return min(wanted.executors, os.cpu_count() or 1)  # the others take turns, and nobody is fed
    return wanted.executors + 1  # one more than there are nodes: the slot that feeds or asks them
