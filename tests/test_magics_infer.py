from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_services import FakeServices
from shell_fixture import TestingShell, running_shell
from test_arguments import FRAME

from tfos_magic import magics, shipping
from tfos_magic.errors import FeedError, NodeError, RemoteException, RemoteFrame, RunInterrupted, UsageError

LINE = "%%tfos_infer -n 2 --data df --out preds"
CELL = f"{LINE}\ndef predict(batch):\n    return batch['x']"


@pytest.fixture
def shell(shell: TestingShell) -> TestingShell:
    shell.user_ns["df"] = FRAME
    return shell


def open_names(services: FakeServices) -> list[bool]:
    return [each.is_open for each in services.inferences]


def predictor_of(services: FakeServices) -> Any:
    """What the payload returns on a node, run here."""
    function, args = shipping.unpack_call(services.calls[-1].payload.data)
    return function(args, "the ctx")


# --- what runs -----------------------------------------------------------------------------------------------


def test_a_cell_becomes_an_inference_with_its_options(shell: TestingShell, services: FakeServices) -> None:
    shell.cell("factor = 3")
    more = "--keep id,name --features x --batch-size 7 --schema 'score float' --timeout 10m --args {'rate': 2}"
    shell.cell(f"{LINE} {more}\nrate = args.rate\ndef predict(batch):\n    return batch['x'] * factor * rate")
    call = services.calls[-1]
    options = call.options
    assert (options.num_nodes, options.chief, options.predicts, options.batch_size) == (2, False, True, 7)
    assert (options.features, options.timeout_s, options.title) == (("x",), 600.0, "Cell In[2] on 2 nodes")
    assert (call.spark, call.frame, call.schema, call.keep) == ("a session", FRAME, "score float", ("id", "name"))
    assert list(call.cell_names.values()) == ["Cell In[2]"]
    assert predictor_of(services)({"x": np.arange(2)}).tolist() == [0, 6]


def test_args_are_those_of_inference(shell: TestingShell, services: FakeServices) -> None:
    shell.cell(f"{LINE} --args {{'path': 'p'}}\nseen = vars(args)\nlambda batch: seen")
    assert predictor_of(services)(None) == {"batch_size": 1024, "features": None, "path": "p"}


def test_the_lazy_frame_is_bound_and_the_magic_says_how_to_stop(shell: TestingShell, services: FakeServices) -> None:
    output = shell.output_of(CELL)
    assert output.value is None
    assert output.stdout == "preds is ready: 2 nodes wait for questions; %tfos_stop preds ends them.\n"
    assert shell.user_ns["preds"] is services.inferences[0].frame
    assert open_names(services) == [True]
    assert services.is_lasting
    one = shell.output_of(CELL.replace("-n 2", "-n 1").replace("preds", "other")).stdout
    assert one == "other is ready: 1 node waits for questions; %tfos_stop other ends it.\n"


def test_save_computes_binds_what_was_written_and_leaves_nothing_open(
    shell: TestingShell, services: FakeServices
) -> None:
    shell.cell("where = 'a place'")
    output = shell.output_of(CELL.replace("preds", "preds --save {where} --mode overwrite --quiet"))
    assert services.calls[-1].saved == ("a place", "overwrite")
    assert shell.user_ns["preds"] == "frame of a place"
    assert output.stdout == "preds is saved, and read from a place; the nodes have ended.\n"
    assert not services.is_lasting
    assert services.boards[-1][1] is True
    assert "Nothing to stop" in shell.output_of("%tfos_stop").stdout


def test_the_board_has_its_title_from_the_first_frame_on(shell: TestingShell, services: FakeServices) -> None:
    shell.cell(CELL)
    assert services.boards[-1][0].view().title == "Cell In[1] on 2 nodes"
    assert services.calls[-1].on_event == services.boards[-1][0].apply


@pytest.mark.parametrize(
    ("define", "name"),
    [
        ("k = 5\ndef predict(batch): return batch['x'] * k", "predict"),
        ("k = 5\ndef load(args, ctx):\n    return lambda batch: batch['x'] * k", "load"),
        ("k = 5\nclass Scorer:\n    def __call__(self, batch): return batch['x'] * k\nscorer = Scorer()", "scorer"),
        ("k = 5\ndef predict(batch, times=k): return batch['x'] * times", "predict"),
    ],
)
def test_what_the_notebook_has_runs_by_name(
    shell: TestingShell, services: FakeServices, define: str, name: str
) -> None:
    shell.cell(define)
    shell.cell(f"%tfos_infer {name} -n 2 --data df --out preds")
    assert services.calls[-1].options.title == f"{name} on 2 nodes"
    assert predictor_of(services)({"x": np.arange(2)}).tolist() == [0, 5]
    assert set(services.calls[-1].cell_names.values()) == {"Cell In[1]"}


def test_a_model_of_the_notebook_predicts_by_name(shell: TestingShell, services: FakeServices) -> None:
    shell.cell("class Model:\n    def predict_on_batch(self, x): return x + 1\nmodel = Model()")
    shell.cell("%tfos_infer model -n 2 --data df --out preds")
    assert predictor_of(services).predict_on_batch(1) == 2
    assert "model" in shell.completions("%tfos_infer -n 2 mo")


def test_a_keras_model_with_layers_of_the_notebook_is_refused(shell: TestingShell, services: FakeServices) -> None:
    """Keras is imported in a kernel of its own elsewhere; here a model that shows what Keras's show."""
    shell.cell(
        "class Twice: ...\nclass Model:\n    def predict_on_batch(self, x): ...\n"
        "    def _flatten_layers(self): return [object(), Twice()]\nmodel = Model()"
    )
    output = shell.error_of("%tfos_infer model -n 2 --data df --out preds")
    assert "a Keras model travels without its classes, and Twice is the notebook's own." in str(output.error)
    assert services.calls == []


def test_a_name_s_own_cell_keeps_its_source(shell: TestingShell, services: FakeServices) -> None:
    shell.cell("def predict(batch):\n    return 1  # here\n%tfos_infer predict -n 2 --data df --out preds")
    sources = services.calls[-1].payload.sources
    assert sorted("# here" in text for text in sources.values()) == [False, True]
    assert sorted(sources)[0] == "<%tfos_infer predict>"


def test_a_session_is_made_when_there_is_none(shell: TestingShell, services: FakeServices) -> None:
    services.found = None
    assert "starting a local one with 3 slots (local[3])" in shell.output_of(CELL).stdout
    assert services.calls[-1].spark == "local[3]"


def test_a_dry_run_starts_and_stops_nothing(shell: TestingShell, services: FakeServices) -> None:
    shell.cell(CELL)
    output = shell.output_of(f"{LINE} --dry-run\nimport keras\nmodel = keras.models.load_model('m')")
    assert "bytes would go to each of 2 nodes" in output.stdout
    assert re.search(r"^keras +/", output.stdout, re.MULTILINE)
    assert "the plan" in output.stdout
    assert open_names(services) == [True]


# --- stopping ------------------------------------------------------------------------------------------------


def test_stop_ends_all_or_the_one_that_is_named(shell: TestingShell, services: FakeServices) -> None:
    for name in ("a", "b", "c"):
        shell.cell(CELL.replace("preds", name))
    assert shell.output_of("%tfos_stop b").stdout == "b: 2 nodes stopped.\n"
    assert open_names(services) == [True, False, True]
    assert shell.output_of("%tfos_stop").stdout == "a: 2 nodes stopped.\nc: 2 nodes stopped.\n"
    assert shell.output_of("%tfos_stop").stdout == "Nothing to stop: nothing runs, and no nodes wait for questions.\n"
    assert shell.output_of("%tfos_stop a").stdout == "Nothing to stop: nothing runs, and no nodes wait for questions.\n"


def test_a_name_that_nobody_has_is_a_mistake_while_there_are_others(shell: TestingShell) -> None:
    shell.cell(CELL)
    fact = "%tfos_stop prds: nothing runs or waits under this name. Did you mean 'preds'?"
    assert str(shell.error_of("%tfos_stop prds").error) == fact
    fact = "%tfos_stop x: nothing runs or waits under this name. There are: preds."
    assert str(shell.error_of("%tfos_stop preds x").error) == fact
    assert shell.output_of("%tfos_stop").stdout == "preds: 2 nodes stopped.\n"


def test_an_inference_whose_nodes_have_failed_is_no_longer_there(shell: TestingShell, services: FakeServices) -> None:
    shell.cell(CELL)
    services.inferences[0].is_open = False
    assert "Nothing to stop" in shell.output_of("%tfos_stop").stdout
    shell.cell(CELL)
    assert open_names(services) == [False, True]


def test_the_same_name_again_ends_the_nodes_before_new_ones_start(shell: TestingShell, services: FakeServices) -> None:
    shell.cell(CELL)
    shell.cell(CELL.replace("preds", "other"))
    shell.cell(CELL)
    assert services.calls[-1].open_before == ["Cell In[2] on 2 nodes"]
    assert open_names(services) == [False, True, True]


def test_a_mistake_in_the_new_cell_leaves_the_old_nodes_alone(shell: TestingShell, services: FakeServices) -> None:
    shell.cell(CELL)
    shell.error_of(f"{LINE}\nnowhere_at_all")
    own = shell.error_of(CELL.replace("--data df", "--data preds"))
    assert "--out preds: it is --data too" in str(own.error) or "a Spark DataFrame is needed" in str(own.error)
    assert open_names(services) == [True]


def test_a_frame_cannot_take_its_own_data_s_name(shell: TestingShell, services: FakeServices) -> None:
    shell.cell(CELL)
    services.inferences[0].frame = FRAME
    output = shell.error_of(CELL)
    assert "--out preds: it is --data too, and its nodes end" in str(output.error)
    assert open_names(services) == [True]


def test_an_error_in_closing_one_does_not_keep_the_others_open(shell: TestingShell, services: FakeServices) -> None:
    for name in ("a", "b", "c"):
        services.failing = {} if name == "c" else {"close": FeedError(f"{name} is stuck.", hint="Wait.")}
        shell.cell(CELL.replace("preds", name))
    output = shell.error_of("%tfos_stop")
    assert open_names(services) == [False] * 3
    assert str(output.error) == "a is stuck.\nWait."
    assert output.stdout.startswith("c: 2 nodes stopped.\n")
    assert "b: stopped, with an error: b is stuck.\n" in output.stderr


def test_unload_ends_all_and_says_what_went_wrong(services: FakeServices, capsys: Any) -> None:
    with running_shell() as shell:
        magics.load(shell, services)  # type: ignore[arg-type]
        shell.user_ns["df"] = FRAME
        services.failing = {"close": KeyboardInterrupt("x")}
        shell.cell(CELL.replace("preds", "a"))
        services.failing = {}
        shell.cell(CELL)
        capsys.readouterr()
        magics.unload(shell)
        assert open_names(services) == [False, False]
        assert capsys.readouterr().err == "a: stopped, with an error: x\n"
        magics.unload(shell)


def test_an_error_of_the_old_nodes_does_not_stop_the_new_ones(shell: TestingShell, services: FakeServices) -> None:
    services.failing = {"close": FeedError("stuck.")}
    shell.cell(CELL)
    services.failing = {}
    assert "preds: stopped, with an error: stuck." in shell.output_of(CELL).stderr
    assert open_names(services) == [False, True]


def test_an_interrupt_while_the_old_nodes_end_starts_no_new_ones(shell: TestingShell, services: FakeServices) -> None:
    services.failing = {"close": RunInterrupted("x")}
    shell.cell(CELL)
    assert isinstance(shell.error_of(CELL).error, KeyboardInterrupt)
    assert len(services.calls) == 1
    assert open_names(services) == [False]


# --- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("%%tfos_infer --data df --out p\n1", "--executors is missing"),
        ("%%tfos_infer -n 2 --out p\n1", "--data is missing: which DataFrame? For example --data df."),
        (
            "%%tfos_infer -n 2 --data df\n1",
            "--out is missing: what is the DataFrame with the predictions to be called?",
        ),
        (f"{LINE} --epochs 3\n1", "Unknown option --epochs. See %tfos_infer --help."),
        (f"{LINE} --modee\n1", "Unknown option --modee. Did you mean --mode?"),
        (f"{LINE} --mode append\n1", "--mode append says how to write, but --save is missing: --save PATH."),
        (f"{LINE}\n  \n", "The cell is empty"),
        (f"{LINE} helper\n1", "Unexpected 'helper': with a cell, the cell is the function."),
        ("%tfos_infer -n 2 --data df --out p", "or write %%tfos_infer above a cell."),
        ("%tfos_infer helpr -n 2 --data df --out p", "no such function or model. Did you mean 'helper'?"),
        ("%tfos_infer five -n 2 --data df --out p", "or a Keras model is needed, not int."),
        ("%tfos_infer none -n 2 --data df --out p", "or a Keras model is needed, not none(a, b, c)."),
        ("%tfos_infer later -n 2 --data df --out p", "or a Keras model is needed, not later(batch)."),
        ("%tfos_infer Kind -n 2 --data df --out p", "or a Keras model is needed, not Kind()."),
        (f"{LINE}\nx = 1\nimport os", "Cell In[2], line 3: the cell ends with an import: nothing there predicts."),
        (f"{LINE}\nx = 1\nx = = 2", "SyntaxError"),
    ],
)
def test_mistakes_fail_the_cell_without_a_traceback(
    shell: TestingShell, services: FakeServices, text: str, message: str
) -> None:
    shell.cell(
        "def helper(x): return x\nfive = 5\ndef none(a, b, c): ...\nasync def later(batch): ...\nclass Kind: ..."
    )
    services.session.find_session = pytest.fail
    output = shell.error_of(text)
    assert isinstance(output.error, UsageError)
    assert message in str(output.error)
    assert output.text.strip() == f"UsageError: {output.error}"
    assert services.calls == []


def test_a_node_s_error_shows_its_own_traceback_alone(shell: TestingShell, services: FakeServices) -> None:
    remote = RemoteException("ValueError", "no", (RemoteFrame("f", 3, "<module>", "raise ValueError('no')"),))
    services.failing["load"] = NodeError(
        "worker:0 failed.", node="worker:0", host="h", remote=remote, cell_names={"f": "Cell In[1]"}
    )
    output = shell.error_of(CELL)
    assert "Cell In[1], line 3, in <module>\n    raise ValueError('no')" in output.text
    assert "run_cell_magic" not in output.text
    assert "preds" not in shell.user_ns
    assert "Nothing to stop" in shell.output_of("%tfos_stop").stdout


@pytest.mark.parametrize("error", [FeedError("no space"), RunInterrupted("interrupted after 3 s")])
def test_what_ends_a_save_early_leaves_nothing_open(
    shell: TestingShell, services: FakeServices, error: BaseException
) -> None:
    services.failing["save"] = error
    assert shell.error_of(CELL.replace("preds", "preds --save p")).error is error
    assert "preds" not in shell.user_ns
    assert open_names(services) == [False]


def test_an_interrupt_when_all_is_ready_closes_it_again(shell: TestingShell, services: FakeServices) -> None:
    class Interrupted:
        def __enter__(self) -> None: ...
        def __exit__(self, *exc: object) -> None:
            raise KeyboardInterrupt

    services.widgets = SimpleNamespace(LiveBoard=lambda *args, **more: Interrupted())
    assert isinstance(shell.error_of(CELL).error, KeyboardInterrupt)
    assert open_names(services) == [False]
    assert "preds" not in shell.user_ns


# --- help and completion -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["%tfos_infer --help", "%%tfos_infer --help", "%tfos_infer", f"{LINE} -h\n1"])
def test_help_is_the_parser_s_text(shell: TestingShell, text: str) -> None:
    output = shell.output_of(text)
    assert "usage: %%tfos_infer --executors N --data DF --out NAME [options]" in output.stdout
    assert "--keep A,B" in output.stdout
    assert max(map(len, output.stdout.splitlines())) <= 120


def test_stop_explains_itself(shell: TestingShell) -> None:
    for text in ("%tfos_stop --help", "%tfos_stop -h"):
        assert "%tfos_stop [NAME]" in shell.output_of(text).stdout
    assert "%tfos_stop [NAME]" in shell.object_inspect_text("%tfos_stop")
    assert "--keep A,B" in shell.object_inspect_text("%%tfos_infer")


def test_options_and_names_complete(shell: TestingShell) -> None:
    shell.cell("def predict(batch): ...")
    shell.cell(CELL)
    assert shell.completions("%%tfos_infer --ke") == ["--keep"]
    assert shell.completions("%%tfos_infer --data ") == ["df"]
    assert "predict" in shell.completions("%tfos_infer -n 2 pre")
    assert shell.completions("%tfos_stop ") == ["preds"]
