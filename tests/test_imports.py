"""Who may know whom: the layers, what an import costs, and what it brings along.

    notebook ──► driver ──► executor ──► both          never back

A module may import its own layer and those to its right. A new module gets its line in `LAYERS`.
"""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tfos_magic

PACKAGE = Path(tfos_magic.__file__).parent
ORDER = ("both", "executor", "driver", "notebook")
LAYERS = {
    "tfos_magic": "both",
    "tfos_magic.TFManager": "both",
    "tfos_magic.archive": "both",
    "tfos_magic.cell": "both",
    "tfos_magic.doctor.second": "both",
    "tfos_magic.ending": "both",
    "tfos_magic.errors": "both",
    "tfos_magic.feed": "both",
    "tfos_magic.grid": "both",
    "tfos_magic.feed.columns": "both",
    "tfos_magic.feed.objects": "both",
    "tfos_magic.marker": "both",
    "tfos_magic.namedtuple_patch": "both",
    "tfos_magic.namedtuple_worker": "both",
    "tfos_magic.namespace": "both",
    "tfos_magic.obstacles": "both",
    "tfos_magic.queue_server": "both",
    "tfos_magic.rendezvous": "both",
    "tfos_magic.shipping": "both",
    "tfos_magic.status": "both",
    "tfos_magic.tracing": "both",
    "tfos_magic.TFNode": "executor",
    "tfos_magic.compat": "executor",
    "tfos_magic.feed.cargo": "executor",
    "tfos_magic.feed.datafeed": "executor",
    "tfos_magic.feed.dataset": "executor",
    "tfos_magic.feed.exchange": "executor",
    "tfos_magic.feed.kept": "executor",
    "tfos_magic.feed.link": "executor",
    "tfos_magic.feed.readers": "executor",
    "tfos_magic.feed.receiver": "executor",
    "tfos_magic.feed.rows": "executor",
    "tfos_magic.feed.sender": "executor",
    "tfos_magic.feed.source": "executor",
    "tfos_magic.feed.spool": "executor",
    "tfos_magic.feed.staging": "executor",
    "tfos_magic.feed.stream": "executor",
    "tfos_magic.feed.task": "executor",
    "tfos_magic.feed.wire": "executor",
    "tfos_magic.logbook": "driver",
    "tfos_magic.machine": "executor",
    "tfos_magic.node": "executor",
    "tfos_magic.node.agent": "executor",
    "tfos_magic.node.channel": "executor",
    "tfos_magic.node.child": "executor",
    "tfos_magic.node.context": "executor",
    "tfos_magic.node.inference": "executor",
    "tfos_magic.node.gpus": "executor",
    "tfos_magic.node.launch": "executor",
    "tfos_magic.node.link": "executor",
    "tfos_magic.node.manager": "executor",
    "tfos_magic.node.output": "executor",
    "tfos_magic.node.processes": "executor",
    "tfos_magic.node.tensorboard": "executor",
    "tfos_magic.serving": "executor",
    "tfos_magic.tfrecords": "executor",
    "tfos_magic.tfrecords.crc32c": "executor",
    "tfos_magic.tfrecords.decode": "executor",
    "tfos_magic.tfrecords.encode": "executor",
    "tfos_magic.tfrecords.example": "executor",
    "tfos_magic.tfrecords.files": "executor",
    "tfos_magic.tfrecords.frames": "executor",
    "tfos_magic.tfrecords.kinds": "executor",
    "tfos_magic.tfrecords.rows": "executor",
    "tfos_magic.tfrecords.slices": "executor",
    "tfos_magic.tfrecords.summary": "executor",
    "tfos_magic.tfrecords.task": "executor",
    "tfos_magic.tfrecords.varints": "executor",
    "tfos_magic.training": "executor",
    "tfos_magic.training.callback_states": "executor",
    "tfos_magic.training.checkpoint_files": "executor",
    "tfos_magic.training.checkpointing": "executor",
    "tfos_magic.training.directories": "executor",
    "tfos_magic.training.export": "executor",
    "tfos_magic.training.neighbours": "executor",
    "tfos_magic.training.options": "executor",
    "tfos_magic.training.accumulation": "executor",
    "tfos_magic.training.agreement": "executor",
    "tfos_magic.training.batch_norm": "executor",
    "tfos_magic.training.exchange": "executor",
    "tfos_magic.training.keras_fit": "executor",
    "tfos_magic.training.packing": "executor",
    "tfos_magic.training.ring": "executor",
    "tfos_magic.training.shared_step": "executor",
    "tfos_magic.training.tf_strategies": "executor",
    "tfos_magic.TFCluster": "driver",
    "tfos_magic.TFParallel": "driver",
    "tfos_magic.background": "driver",
    "tfos_magic.briefing": "driver",
    "tfos_magic.cluster": "driver",
    "tfos_magic.dfutil": "driver",
    "tfos_magic.doctor": "driver",
    "tfos_magic.doctor.arrival": "driver",
    "tfos_magic.doctor.case": "driver",
    "tfos_magic.doctor.code": "driver",
    "tfos_magic.doctor.dialects": "driver",
    "tfos_magic.doctor.doctor": "driver",
    "tfos_magic.doctor.findings": "driver",
    "tfos_magic.doctor.graph": "driver",
    "tfos_magic.doctor.namedtuples": "driver",
    "tfos_magic.doctor.names": "driver",
    "tfos_magic.doctor.remote": "driver",
    "tfos_magic.doctor.round_trip": "driver",
    "tfos_magic.doctor.traps": "driver",
    "tfos_magic.doctor.traps.classes": "driver",
    "tfos_magic.doctor.traps.errors": "driver",
    "tfos_magic.doctor.traps.functions": "driver",
    "tfos_magic.doctor.traps.handles": "driver",
    "tfos_magic.doctor.traps.modules": "driver",
    "tfos_magic.doctor.traps.sizes": "driver",
    "tfos_magic.doctor.traps.spark": "driver",
    "tfos_magic.doctor.traps.streams": "driver",
    "tfos_magic.doctor.traps.tensorflow": "driver",
    "tfos_magic.failures": "driver",
    "tfos_magic.feed.prepare": "driver",
    "tfos_magic.feeding": "driver",
    "tfos_magic.inference": "driver",
    "tfos_magic.java": "driver",
    "tfos_magic.jobs": "driver",
    "tfos_magic.launching": "driver",
    "tfos_magic.members": "driver",
    "tfos_magic.namedtuple_jobs": "driver",
    "tfos_magic.namedtuple_session": "driver",
    "tfos_magic.options": "driver",
    "tfos_magic.pipeline": "driver",
    "tfos_magic.pipeline_files": "driver",
    "tfos_magic.pipeline_params": "driver",
    "tfos_magic.queues": "driver",
    "tfos_magic.result": "driver",
    "tfos_magic.roles": "driver",
    "tfos_magic.session": "driver",
    "tfos_magic.tasks": "driver",
    "tfos_magic.tfrecords.output": "driver",
    "tfos_magic.arguments": "notebook",
    "tfos_magic.arguments.doctor": "notebook",
    "tfos_magic.arguments.expressions": "notebook",
    "tfos_magic.arguments.lines": "notebook",
    "tfos_magic.arguments.namedtuple": "notebook",
    "tfos_magic.arguments.names": "notebook",
    "tfos_magic.arguments.parsers": "notebook",
    "tfos_magic.arguments.runs": "notebook",
    "tfos_magic.arguments.values": "notebook",
    "tfos_magic.arguments.words": "notebook",
    "tfos_magic.completion": "notebook",
    "tfos_magic.doctor_magic": "notebook",
    "tfos_magic.dry_run": "notebook",
    "tfos_magic.magics": "notebook",
    "tfos_magic.notebook": "notebook",
    "tfos_magic.runs_magic": "notebook",
    "tfos_magic.standing": "notebook",
    "tfos_magic.scalars": "driver",
    "tfos_magic.tensorboard_magic": "notebook",
    "tfos_magic.tensorboard_server": "driver",
    "tfos_magic.widgets": "notebook",
    "tfos_magic.widgets.background": "notebook",
    "tfos_magic.widgets.chart": "notebook",
    "tfos_magic.widgets.diagnosis": "notebook",
    "tfos_magic.widgets.html": "notebook",
    "tfos_magic.widgets.live": "notebook",
    "tfos_magic.widgets.namedtuple_table": "notebook",
    "tfos_magic.widgets.outputs": "notebook",
    "tfos_magic.widgets.stop_button": "notebook",
    "tfos_magic.widgets.text": "notebook",
    "tfos_magic.widgets.words": "notebook",
}
# The package's face names modules of all layers, and loads none of them before it is asked for one.
FACE = "tfos_magic"
# One step back, and why: a result draws itself when a notebook asks for its HTML, and only then.
HEAVY = {"IPython", "asyncio", "ipywidgets", "keras", "multiprocessing", "numpy", "pandas", "pyarrow", "pyspark"}
ABSENT_ON_EXECUTORS = {"IPython", "ipywidgets", "keras", "pyspark", "tensorflow"}
# Reached only when the user's function has imported Keras, which itself imports IPython where that is installed.
NEEDS_KERAS = {
    "tfos_magic.training.accumulation",
    "tfos_magic.training.batch_norm",
    "tfos_magic.training.callback_states",
    "tfos_magic.training.checkpoint_files",
    "tfos_magic.training.checkpointing",
    "tfos_magic.training.exchange",
    "tfos_magic.training.keras_fit",
    "tfos_magic.training.shared_step",
}
IMPORT_LIMIT_S = 0.050


def modules() -> dict[str, Path]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {
        ".".join((FACE, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in paths
    }


def imported_names(path: Path) -> Iterator[str]:
    """Every dotted name that an import statement anywhere in the file mentions, absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def fresh(code: str) -> str:
    """Run in an interpreter that has imported nothing yet; warnings are errors there too."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def new_modules(code: str) -> set[str]:
    """Return what `code` leaves in sys.modules beyond what a bare interpreter has."""
    listing = "import sys; before = set(sys.modules)\n{}\nprint(*sorted(set(sys.modules) - before))"
    return set(fresh(listing.format(code)).split())


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_every_module_has_a_layer_and_every_line_of_the_table_a_module() -> None:
    assert sorted(modules()) == sorted(LAYERS)


@pytest.mark.parametrize("module", sorted(set(modules()) - {FACE}))
def test_imports_never_go_back(module: str) -> None:
    allowed = ORDER[: ORDER.index(LAYERS.get(module, "both")) + 1]
    known = [n for n in imported_names(modules()[module]) if n in LAYERS]
    back = {n: LAYERS[n] for n in known if n != FACE and LAYERS[n] not in allowed}
    assert not back, f"{module} ({LAYERS.get(module)}) must not know {back}"


@pytest.mark.parametrize("module", sorted(set(modules())))
def test_only_the_notebook_layer_knows_ipython(module: str) -> None:
    if LAYERS.get(module) != "notebook" and module != FACE:
        assert not {"IPython", "ipywidgets", "ipykernel"} & roots(set(imported_names(modules()[module])))


def test_importing_the_package_brings_nothing_but_a_little_standard_library() -> None:
    new = new_modules("import tfos_magic")
    assert {name for name in new if name.startswith(FACE)} == {FACE}
    assert roots(new) <= set(sys.stdlib_module_names) | {FACE}
    assert not roots(new) & HEAVY
    assert len(new) < 40, sorted(new)


def test_importing_the_package_is_quick() -> None:
    # CPU time, because it tells the same on a busy machine. A bare interpreter's own start is not in it.
    code = "import time; start = time.process_time(); import tfos_magic; print(time.process_time() - start)"
    assert statistics.median(float(fresh(code)) for _ in range(5)) < IMPORT_LIMIT_S


@pytest.mark.parametrize(
    "module", sorted(n for n, layer in LAYERS.items() if layer in ("both", "executor") and n not in NEEDS_KERAS)
)
def test_what_runs_on_executors_needs_no_notebook_no_pyspark_and_no_tensorflow_to_be_imported(module: str) -> None:
    assert not roots(new_modules(f"import {module}")) & ABSENT_ON_EXECUTORS


def test_the_package_never_imports_its_tests_dependencies() -> None:
    used = {root for path in modules().values() for root in roots(set(imported_names(path)))}
    assert not used & {"pytest", "nbclient", "nbformat", "playwright", "jupyterlab", "sklearn", "hypothesis"}
