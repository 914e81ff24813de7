"""The magics: parse the line, call one function, display the result.

Runs on: notebook. The only module besides ``widgets`` that knows IPython.

    %load_ext tfos_magic ──► load(shell) ──► Extension     owns all that is put into the shell; takes it back
    %%tfos_train line, cell
        │ arguments.parse_train     the line, checked
        ▼ cell.map_function         the cell, as a function
        ▼ shipping.pack             function and args, as bytes; or what is wrong with them
        ▼ session                   the notebook's Spark, or a local one
        ▼ cluster.run               inside widgets.LiveBoard
    RunResult ──► --out NAME, or the cell's value
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import IPython
from IPython.core.completer import SimpleCompletion, context_matcher
from IPython.core.magic import no_var_expand

import tfos_magic
from tfos_magic import arguments, completion, shipping
from tfos_magic.arguments import HelpRequestedError, TrainLine
from tfos_magic.cell import CellFunction, has_trailing_semicolon, map_function
from tfos_magic.errors import TfosError, UsageError
from tfos_magic.status import StatusBoard

if TYPE_CHECKING:
    from IPython.core.completer import CompletionContext, SimpleMatcherResult
    from IPython.core.interactiveshell import InteractiveShell

    from tfos_magic.cluster import RunOptions
    from tfos_magic.shipping import Payload

_MAGICS = {"tfos_train": "line_cell", "tfos_namedtuple": "line"}
_USES_TENSORFLOW = ("tensorflow", "keras", ".dataset(", ".distribute(", ".strategy(")
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
        if name not in ("cluster", "namedtuple_patch", "session", "widgets"):
            raise AttributeError(name)
        return importlib.import_module(f"tfos_magic.{name}")


class Extension:
    """All that is put into one shell.

    Parameters
    ----------
    shell : InteractiveShell
    services : Services
    """

    def __init__(self, shell: InteractiveShell, services: Services) -> None:
        self._shell = shell
        self._services = services

    # --- coming and going ---

    def load(self) -> None:
        """Register everything and say what is ready."""
        report = self._services.namedtuple_patch.revert()
        for name, kind in _MAGICS.items():
            self._shell.register_magic_function(getattr(self, name), kind, name)
        self._shell.input_transformers_cleanup.append(give_help_a_body)
        if self._shell.Completer is not None:
            self._shell.Completer.custom_matchers.append(self.match)
        print(f"tfos_magic {tfos_magic.__version__}: {_versions()}; {report.summary}; {self._describe_session()}")

    def unload(self) -> None:
        """Take back what :meth:`load` did."""
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
        self._services.namedtuple_patch.restore()

    def _describe_session(self) -> str:
        if "pyspark" not in sys.modules:
            return "no Spark session yet"
        try:
            found = self._services.session.find_session(self._namespace)
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
                raise HelpRequestedError
            return self._train(arguments.parse_train(line, self._namespace), cell)

    tfos_train.__doc__ = arguments.train_parser().format_help()

    @no_var_expand
    def tfos_namedtuple(self, line: str) -> None:
        """Say whether PySpark's namedtuple patch is on, take it out, or put it back.

        %tfos_namedtuple [status | revert | restore]
        """
        with _help_on_request():
            action = line.strip() or "status"
            if action in ("--help", "-h"):
                print(inspect.getdoc(self.tfos_namedtuple))
                return
            if action not in completion.NAMEDTUPLE_ACTIONS:
                close = difflib.get_close_matches(action, completion.NAMEDTUPLE_ACTIONS, n=1)
                hint = f"Did you mean {close[0]}?" if close else "One of status, revert, restore."
                raise UsageError(f"%tfos_namedtuple {action}: no such action. {hint}")
            print(getattr(self._services.namedtuple_patch, action)().summary)

    @context_matcher()  # type: ignore[untyped-decorator]  # IPython's
    def match(self, context: CompletionContext) -> SimpleMatcherResult:
        """Complete options and names on the lines of our magics."""
        found = completion.choices(context.text_until_cursor, context.token, self._namespace)
        completions = [
            SimpleCompletion(text, type="param" if text.startswith("-") else "instance") for text in found or ()
        ]
        return cast("SimpleMatcherResult", {"completions": completions, "suppress": bool(found)})

    # --- a run ---

    @property
    def _namespace(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self._shell.user_ns)

    def _train(self, wanted: TrainLine, cell: str | None) -> Any:
        function = self._function(wanted, cell)
        args = _args(wanted)
        payload = shipping.pack(function, args=args)
        options = self._options(wanted, function, payload)
        for warning in payload.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if wanted.is_dry_run:
            self._show_plan(wanted, payload, options)
            return None
        result = self._run(wanted, payload, options)
        if wanted.out:
            self._namespace[wanted.out] = result
        is_silent = wanted.out or wanted.is_quiet or has_trailing_semicolon(cell or "")
        return None if is_silent else result

    def _function(self, wanted: TrainLine, cell: str | None) -> Callable[..., Any]:
        if cell is None:
            return self._named_function(wanted.function)
        if wanted.function is not None:
            raise UsageError(f"Unexpected {wanted.function!r}: with a cell, the cell is the function.")
        if not cell.strip():
            raise UsageError("The cell is empty: what should the nodes run?")
        label = self._label
        try:
            return map_function(
                cell,
                self._namespace,
                filename=self._running_filename(),
                label=label,
                flags=self._shell.compile.flags & _future_flags(),
            )
        except SyntaxError as error:
            raise _syntax_error(error, cell, label) from None

    def _named_function(self, name: str | None) -> Callable[..., Any]:
        if name is None:
            raise UsageError(
                "Nothing to run: give the name of a function of (args, ctx), or write %%tfos_train above a cell."
            )
        function = self._namespace.get(name)
        if function is None:
            close = arguments.did_you_mean(name, arguments.names_of_functions(self._namespace))
            raise UsageError(f"NAME {name}: the notebook has no such function.{close}")
        if not callable(function) or not _takes_two(function):
            raise UsageError(f"NAME {name}: a function of (args, ctx) is needed, not {_signature(function)}.")
        return cast("Callable[..., Any]", function)

    def _options(self, wanted: TrainLine, function: Callable[..., Any], payload: Payload) -> RunOptions:
        # A body knows nothing of parameter servers: they serve, and the chief runs it. A function of (args, ctx)
        # follows TensorFlowOnSpark, and looks at ctx.job_name itself.
        is_body = isinstance(function, CellFunction) and function.entry is None
        options: RunOptions = self._services.cluster.RunOptions(
            num_nodes=wanted.executors,
            num_ps=wanted.ps,
            chief=wanted.chief,
            evaluator=wanted.evaluator,
            epochs=wanted.epochs,
            batch_size=wanted.batch_size,
            label=wanted.label,
            features=wanted.features,
            weight=wanted.weight,
            shuffle=wanted.shuffle,
            seed=wanted.seed,
            timeout_s=wanted.timeout_s,
            serves_itself=not (wanted.ps and wanted.chief and is_body),
            preload=_preload(payload),
            title=f"{wanted.function or self._label} on {wanted.executors} nodes",
        )
        return options

    def _run(self, wanted: TrainLine, payload: Payload, options: RunOptions) -> Any:
        frames = {"train": wanted.data, "validation": wanted.validation}
        spark = self._session(wanted)
        board = StatusBoard()
        with self._services.widgets.LiveBoard(board, self._shell, quiet=wanted.is_quiet):
            return self._services.cluster.run(
                spark,
                payload,
                options,
                data={name: frame for name, frame in frames.items() if frame is not None},
                board=board,
                cell_names=self._cell_names(payload),
            )

    def _session(self, wanted: TrainLine) -> Any:
        found = self._services.session.find_session(self._namespace, wanted.session)
        if found is not None:
            return found
        slots = _local_slots(wanted)
        print(f"No Spark session in the notebook: starting a local one with {slots} slots (local[{slots}]).")
        return self._services.session.local_session(slots)

    def _show_plan(self, wanted: TrainLine, payload: Payload, options: RunOptions) -> None:
        found = self._services.session.find_session(self._namespace, wanted.session)
        lines = [f"{len(payload.data):,} bytes would go to each of {wanted.executors} nodes.", ""]
        lines += _table([("object", "kind", "bytes", "how"), *_object_rows(payload)])
        if payload.modules:
            lines += ["", *_table([("module", "the driver has it at"), *_module_rows(payload)])]
        lines.append("")
        if found is None:
            slots = _local_slots(wanted)
            lines.append(
                f"No Spark session in the notebook: a local one would start with {slots} slots (local[{slots}])."
            )
        else:
            lines += self._services.cluster.plan(found, options)
        print("\n".join(lines))

    # --- the running cell ---

    @property
    def _label(self) -> str:
        return self._cell_name(self._running_filename()) or f"Cell In[{self._running_count}]"

    @property
    def _running_count(self) -> int:
        """Number of the running cell; IPython 9 counts up before a cell runs, older ones after."""
        return int(self._shell.execution_count) - (IPython.version_info[0] >= 9)

    def _running_filename(self) -> str:
        """Return the name under which IPython has compiled the cell that is running."""
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code.co_name == "<module>" and frame.f_globals is self._shell.user_global_ns:
                return frame.f_code.co_filename
            frame = frame.f_back
        return "<no cell>"

    def _cell_names(self, payload: Payload) -> dict[str, str]:
        """Map the file name of every cell whose code travels to how the notebook calls that cell."""
        names = {filename: self._cell_name(filename) for filename in payload.sources}
        return {filename: name for filename, name in names.items() if name}

    def _cell_name(self, filename: str) -> str:
        return " ".join(self._shell.compile.format_code_name(filename) or ())


def give_help_a_body(lines: list[str]) -> list[str]:
    """Let ``%%tfos_train --help`` run without a cell: IPython refuses cell magics whose body is empty."""
    if len(lines) == 1 and lines[0].startswith("%%tfos_") and not lines[0].rstrip().endswith("?"):
        return [lines[0].rstrip("\n") + "\n", "\n"]
    return lines


# Without this a terminal would ask this function whether the cell is complete, and never wait for its second line.
give_help_a_body.has_side_effects = True  # type: ignore[attr-defined]  # IPython asks the function


@contextlib.contextmanager
def _help_on_request() -> Iterator[None]:
    """Print the help text where the line asks for it."""
    try:
        yield
    except HelpRequestedError:
        print(arguments.train_parser().format_help())


def _syntax_error(error: SyntaxError, cell: str, label: str) -> UsageError:
    """Return the error with the cell's own line: IPython would put the driver's frames above a plain SyntaxError."""
    number = error.lineno or 1
    lines = ["", *cell.split("\n")]  # the magic's line is line 1
    source = lines[number - 1] if number <= len(lines) else ""
    caret = " " * max(0, (error.offset or 1) - 1) + "^"
    is_return = "'return' outside function" in str(error.msg)
    return UsageError(
        f"{label}, line {number}\n    {source}\n    {caret}\nSyntaxError: {error.msg}",
        hint="The value of the cell's last expression comes back; no return is needed." if is_return else "",
    )


def _versions() -> str:
    tensorflow = next(filter(None, map(_version, _TENSORFLOW)), "missing")
    return f"TensorFlow {tensorflow}, PySpark {_version('pyspark') or 'missing'}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _args(wanted: TrainLine) -> argparse.Namespace:
    """Return what the function gets as ``args``: the options, then ``--args``, which may override them."""
    names = ("epochs", "batch_size", "label", "features", "weight", "shuffle", "seed")
    return argparse.Namespace(**{**{name: getattr(wanted, name) for name in names}, **(wanted.args or {})})


def _preload(payload: Payload) -> tuple[str, ...]:
    """Return what the nodes import while they meet: TensorFlow, unless nothing says that the function uses it."""
    modules = {module.name.partition(".")[0] for module in payload.modules}
    text = "\n".join(payload.sources.values())
    wants = modules & {"tensorflow", "keras", "tf_keras"} or any(word in text for word in _USES_TENSORFLOW)
    return ("tensorflow",) if wants else ()


def _local_slots(wanted: TrainLine) -> int:
    return wanted.executors + 1  # one more than there are nodes: the slot that feeds them


def _future_flags() -> int:
    import __future__

    return sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # made in C, without a signature: it must tell itself
        return True
    return True


def _signature(value: Any) -> str:
    try:
        return f"{getattr(value, '__name__', type(value).__name__)}{inspect.signature(value)}"
    except (TypeError, ValueError):
        return type(value).__name__


def _object_rows(payload: Payload) -> list[tuple[str, ...]]:
    return [(each.name, each.kind, f"{each.size_bytes:,}", each.how) for each in payload.objects]


def _module_rows(payload: Payload) -> list[tuple[str, ...]]:
    return [
        (each.name, f"{each.file or 'nowhere'}{'  (not installed: executors may lack it)' if each.is_local else ''}")
        for each in payload.modules
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
