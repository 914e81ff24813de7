"""TFEstimator and TFModel inside ``pyspark.ml``, with real nodes and real models."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tfos_magic import pipeline
from tfos_magic.errors import DataError, NodeError, UsageError
from tfos_magic.pipeline import Namespace, TFEstimator, TFModel

pytestmark = pytest.mark.slow

Script = Callable[..., subprocess.CompletedProcess[str]]


def by_value(function: Any) -> Any:
    """Let a function of this file travel as a notebook's do: nodes cannot import this file."""
    function.__module__ = "__main__"
    return function


@by_value
def train_line(args: Any, ctx: Any) -> None:
    """Fit y = w·x by least squares over the rows of this node, and let the chief write the model."""
    import json

    import keras
    import numpy as np

    feed = ctx.get_data_feed(train_mode=True, input_mapping=args.input_mapping)
    xs, ys, batches = [], [], 0
    while not feed.should_stop():
        batch = feed.next_batch(args.batch_size)
        assert len(batch["y"]) <= args.batch_size
        xs.append(batch["x"])
        ys.append(batch["y"])
        batches += 1
    x, y = np.concatenate(xs), np.concatenate(ys)
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    if not ctx.is_chief:
        return
    model = keras.Sequential([keras.Input((2,), name="x"), keras.layers.Dense(1, use_bias=False)])
    model.layers[-1].set_weights([weights.reshape(2, 1).astype("float32")])
    model.export(args.export_dir)
    with open(args.export_dir + "/seen.json", "w") as file:
        json.dump({"rows": len(y), "batches": batches, "rate": args.rate, "nodes": ctx.num_workers}, file)


@by_value
def fail(args: Any, ctx: Any) -> None:
    raise ValueError("not like this")


MAKE_MODELS = """
import sys
import keras
import numpy as np
import tensorflow as tf

directory = sys.argv[1]
line = keras.Sequential([keras.Input((2,), name="x"), keras.layers.Dense(1, use_bias=False)])
line.layers[-1].set_weights([np.array([[1.0], [10.0]], np.float32)])
image, count = keras.Input((2, 3), name="image"), keras.Input((), name="count", dtype="int32")
outputs = {"image_again": image * 2.0, "next": count + 1, "sum": keras.ops.sum(image, axis=(1, 2))}
several = keras.Model({"image": image, "count": count}, outputs)
for name, model in {"line": line, "several": several}.items():
    model.export(f"{directory}/{name}")
    model.save(f"{directory}/{name}.keras")

class Words(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, "word")])
    def shout(self, word):
        return {"loud": tf.strings.upper(word), "length": tf.strings.length(word)}

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, "word")])
    def count(self, word):
        return {"rows": tf.size(word), "unknown": tf.py_function(len, [word], tf.int32)}

words = Words()
tf.saved_model.save(words, f"{directory}/words", signatures={"shout": words.shout, "count": words.count})
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of some models: a line, images and words in and several outputs, the same as ``.keras`` files."""
    directory = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, "-c", MAKE_MODELS, str(directory)], check=True, timeout=100)
    return {path.name: str(path) for path in directory.iterdir()}


@pytest.fixture
def points(spark_local4: Any) -> Any:
    return spark_local4.range(0, 1000, 1, 2).selectExpr(
        "id", "array(id / 10, id % 7) as features", "id / 10 + 10 * (id % 7) as label", "concat('r', id) as name"
    )


def line_model(path: str, **params: Any) -> TFModel:
    model = TFModel({"export_dir": path}).setInputMapping({"features": "x"})
    return model.setOutputMapping({"output_0": "prediction"})._set(**params)


# --- training ---------------------------------------------------------------------------------------------------


def test_an_estimator_trains_and_gives_a_model_that_predicts(spark_local4: Any, points: Any, tmp_path: Path) -> None:
    estimator = TFEstimator(train_line, {"rate": 0.1, "batch_size": 7, "unused": None})
    estimator.setInputMapping({"features": "x", "label": "y"}).setClusterSize(2).setEpochs(2).setBatchSize(64)
    estimator.setExportDir(str(tmp_path / "model")).setGraceSecs(0)
    model = estimator.fit(points)
    assert isinstance(model, TFModel)
    assert model.getExportDir() == str(tmp_path / "model")
    assert model.getBatchSize() == 64
    seen = json.loads((tmp_path / "model" / "seen.json").read_text())
    assert seen["rate"] == 0.1
    assert 900 <= seen["rows"] <= 1100  # of 2 × 1000, on one of two nodes
    assert seen["batches"] >= seen["rows"] // 64
    result = model.setInputMapping({"features": "x"}).setOutputMapping({"output_0": "y"}).transform(points)
    assert result.dtypes == [("y", "array<float>")]
    expected = [row.label for row in points.collect()]
    assert [row.y[0] for row in result.collect()] == pytest.approx(expected, rel=1e-3, abs=1e-2)


def test_an_error_on_a_node_is_raised_by_fit(points: Any) -> None:
    estimator = TFEstimator(fail, {}).setInputMapping({"features": "x"})
    with pytest.raises(NodeError, match="not like this"):
        estimator.fit(points)


def test_a_command_line_reaches_the_function_as_it_is(spark_local4: Any, points: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "argv")

    def write_arguments(args: Any, ctx: Any) -> None:
        import sys

        feed = ctx.get_data_feed()
        rows = []
        while not feed.should_stop():
            rows += feed.next_batch(100)
        with open(args[2], "w") as file:
            file.write(repr((args, sys.argv, len(rows), len(rows[0]))))

    estimator = TFEstimator(by_value(write_arguments), ["program", "--path", path])
    model = estimator.setInputMapping({"features": "x", "id": "y"}).fit(points)
    arguments = ["program", "--path", path]
    assert Path(path).read_text() == repr((arguments, arguments, 1000, 2))
    assert model.args.argv == arguments


def test_export_fn_runs_once_after_the_training(spark_local4: Any, points: Any, tmp_path: Path) -> None:
    def nothing(args: Any, ctx: Any) -> None:
        ctx.get_data_feed().terminate()

    def export(args: Any) -> None:
        with open(args.export_dir, "a") as file:
            file.write(f"{args.epochs} ")

    estimator = TFEstimator(by_value(nothing), {}, by_value(export)).setExportDir(str(tmp_path / "e")).setEpochs(2)
    with pytest.warns(DeprecationWarning, match="let train_fn write the model"):
        estimator.setInputMapping({"id": "x"}).fit(points)
    assert (tmp_path / "e").read_text() == "2 "


def test_unknown_columns_and_impossible_params_are_refused_at_once(points: Any) -> None:
    estimator = TFEstimator(fail, {})
    with pytest.raises(UsageError, match=r"no column 'feature'[\s\S]*'features'"):
        estimator.setInputMapping({"feature": "x"}).fit(points)
    with pytest.raises(UsageError, match="input_mode=0 is not for pipelines"):
        estimator.setInputMode(0)
    with pytest.raises(UsageError, match="protocol='rdma'"):
        estimator.setProtocol("rdma")
    with pytest.raises(TypeError, match="Could not convert"):
        estimator.setInputMapping(["x"])
    with pytest.raises(UsageError, match="Arguments cannot be a int"):
        TFModel(3)


# --- params -----------------------------------------------------------------------------------------------------


def test_every_param_has_its_setter_and_getter() -> None:
    values = {
        "input_mapping": {"a": "b"}, "output_mapping": {"a": "b"}, "cluster_size": 3, "num_ps": 1,
        "driver_ps_nodes": True, "input_mode": 1, "master_node": "master", "protocol": "grpc", "tensorboard": True,
        "model_dir": "m", "export_dir": "e", "tfrecord_dir": "t", "batch_size": 5, "epochs": 6, "readers": 7,
        "steps": 8, "grace_secs": 9, "signature_def_key": "s", "tag_set": "serve", "keep_columns": True,
    }  # fmt: skip
    words = {"num_ps": "NumPS", "driver_ps_nodes": "DriverPSNodes", "tfrecord_dir": "TFRecordDir"}
    names: set[str] = set()
    for stage in (TFEstimator(fail, {}), TFModel({})):
        for param in stage.params:
            word = words.get(param.name, param.name.title().replace("_", ""))
            assert getattr(stage, f"set{word}")(values[param.name]) is stage
            assert getattr(stage, f"get{word}")() == values[param.name]
            names.add(param.name)
    assert names == set(values)


def test_defaults_are_tfoss() -> None:
    estimator, model = TFEstimator(fail, {}), TFModel({})
    assert {param.name: estimator.getOrDefault(param) for param in estimator.params} == {
        "input_mapping": {}, "cluster_size": 1, "num_ps": 0, "driver_ps_nodes": False, "input_mode": 1,
        "master_node": "chief", "protocol": "grpc", "tensorboard": False, "model_dir": None, "export_dir": None,
        "tfrecord_dir": None, "batch_size": 100, "epochs": 1, "readers": 1, "steps": 1000, "grace_secs": 30,
    }  # fmt: skip
    assert {param.name: model.getOrDefault(param) for param in model.params} == {
        "input_mapping": {}, "output_mapping": {}, "keep_columns": False, "batch_size": 100, "model_dir": None,
        "export_dir": None, "signature_def_key": None, "tag_set": None,
    }  # fmt: skip


def test_what_was_set_counts_before_the_argument_and_that_before_the_default() -> None:
    estimator = TFEstimator(fail, argparse.Namespace(batch_size=32, epochs=5, mine="x")).setEpochs(7)
    merged: Any = estimator.merge_args_params()
    assert (merged.batch_size, merged.epochs, merged.steps, merged.mine) == (32, 7, 1000, "x")
    assert estimator.args == Namespace({"batch_size": 32, "epochs": 5, "mine": "x"})  # as it was


def test_a_namespace_is_made_of_anything_and_behaves_as_tfoss() -> None:
    namespace = Namespace({"b": 1, "a": "x"})
    assert "a" in namespace
    assert sorted(namespace) == ["a", "b"]
    assert repr(namespace) == "Namespace(a='x', b=1)"
    assert namespace == Namespace(argparse.Namespace(a="x", b=1)) == Namespace(namespace)
    assert namespace != Namespace({"a": "x"})
    assert pickle.loads(pickle.dumps(namespace)) == namespace
    words = Namespace(["p", "--x"])
    assert list(words) == words.argv == ["p", "--x"]
    assert words == ["p", "--x"]
    assert repr(words) == "['p', '--x']"


def test_a_copy_has_params_of_its_own_and_the_same_function() -> None:
    estimator = TFEstimator(train_line, {"rate": 1}).setEpochs(3)
    copied = estimator.copy({estimator.batch_size: 9})
    assert (copied.getEpochs(), copied.getBatchSize(), estimator.getBatchSize()) == (3, 9, 100)
    assert copied.train_fn is train_line
    assert copied.args == estimator.args
    assert copied.setEpochs(4) is copied
    assert estimator.getEpochs() == 3


# --- transform --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["line", "line.keras"])
def test_only_the_outputs_come_back_in_the_rows_order(spark_local4: Any, points: Any, models: Any, model: str) -> None:
    result = line_model(models[model], batch_size=33).transform(points)
    assert result.dtypes == [("prediction", "array<float>")]
    expected = [[pytest.approx(row.label, rel=1e-5, abs=1e-3)] for row in points.collect()]
    assert [row.prediction for row in result.collect()] == expected
    assert result.rdd.getNumPartitions() == points.rdd.getNumPartitions()


def test_kept_columns_come_first_and_unchanged_whatever_their_type(spark_local4: Any, points: Any, models: Any) -> None:
    from pyspark.ml.linalg import Vectors

    df = points.selectExpr(
        "id", "features", "named_struct('a', id, 'b', map('k', name)) as `odd.name`", "date'2024-02-29' as day",
        "cast(id as decimal(20, 3)) as money", "if(id % 2 = 0, null, name) as maybe",
    )  # fmt: skip
    vectors = spark_local4.createDataFrame([(n, Vectors.dense([n / 10, -n])) for n in range(1000)], ["id", "v"])
    df = df.join(vectors, "id").orderBy("id").coalesce(2)
    result = line_model(models["line"], keep_columns=True).setInputMapping({"v": "x"}).transform(df)
    assert result.columns == [*df.columns, "prediction"]
    assert result.drop("prediction").schema == df.schema
    rows = result.collect()
    assert [tuple(row)[:-1] for row in rows] == [tuple(row) for row in df.collect()]
    assert rows[500].prediction == [pytest.approx(50 - 5000)]
    with pytest.raises(UsageError, match="has a column 'id' already"):
        line_model(models["line"], keep_columns=True).setOutputMapping({"output_0": "id"}).transform(df)


@pytest.mark.parametrize("kind", ["several", "several.keras"])
def test_inputs_and_outputs_of_several_shapes_and_types(spark_local4: Any, models: Any, kind: str) -> None:
    df = spark_local4.range(0, 10, 1, 2).selectExpr("id", "transform(sequence(0, 5), k -> double(k + id)) image")
    model = TFModel({"export_dir": models[kind]}).setInputMapping({"image": "image", "id": "count"})
    result = model.transform(df)  # all outputs, by their own names
    assert result.dtypes == [("image_again", "array<array<float>>"), ("next", "int"), ("sum", "float")]
    for number, row in enumerate(result.collect()):
        image = (np.arange(6) + number).reshape(2, 3)
        assert row.image_again == (2 * image).tolist()
        assert (row.next, row.sum) == (number + 1, image.sum())
    some = model.setOutputMapping({"sum": "total:0", "next": "n"}).transform(df)
    assert some.columns == ["n", "total:0"]  # in the order of the tensors' names


def test_columns_named_as_the_tensors_need_no_mapping(spark_local4: Any, models: Any) -> None:
    df = spark_local4.createDataFrame([([1.0, 2.0],)], ["x"])
    result = TFModel({}).setModelDir(os.path.dirname(models["line"])).setExportDir(models["line"]).transform(df)
    assert result.collect() == [([21.0],)]


def test_signatures_tags_and_text(spark_local4: Any, models: Any) -> None:
    df = spark_local4.createDataFrame([("ab",), ("ü",)], ["w"]).coalesce(1)
    model = TFModel({}).setExportDir(f"file://{models['words']}").setInputMapping({"w": "word:0"}).setTagSet("serve")
    result = model.setSignatureDefKey("shout").transform(df)
    assert result.dtypes == [("length", "int"), ("loud", "binary")]
    assert [tuple(row) for row in result.collect()] == [(2, b"AB"), (2, "ü".encode())]
    with pytest.raises(DataError, match=r"no signature 'serving_default' but (shout, count|count, shout)"):
        TFModel({"export_dir": models["words"]}).transform(df)
    for output in ("rows", "unknown"):
        with pytest.raises(DataError, match=f"Output '{output}' has no row dimension"):
            model.setSignatureDefKey("count").setOutputMapping({output: "o"}).transform(df)


@pytest.mark.parametrize(
    ("mapping", "found"),
    [
        ({"features": "z"}, r"gives the tensors z; the model takes x[\s\S]*setInputMapping\(\{'<column>': 'x'\}\)"),
        ({"featurs": "x"}, r"no column 'featurs'[\s\S]*'features'"),
    ],
)
def test_input_mappings_that_do_not_fit_are_refused_at_once(
    points: Any, models: Any, mapping: dict[str, str], found: str
) -> None:
    with pytest.raises(UsageError, match=found):
        line_model(models["line"]).setInputMapping(mapping).transform(points)


def test_output_mappings_and_paths_that_do_not_fit_are_refused_at_once(
    points: Any, models: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="names the tensor y; the model gives output_0"):
        line_model(models["line"]).setOutputMapping({"y": "p"}).transform(points)
    with pytest.raises(DataError, match=f"There is no model at {tmp_path}"):
        line_model(str(tmp_path)).transform(points)
    with pytest.raises(DataError, match=r"2 \.keras files: line\.keras, several\.keras"):
        line_model(os.path.dirname(models["line"])).transform(points)
    with pytest.raises(UsageError, match="Neither export_dir nor model_dir"):
        TFModel({}).transform(points)


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("if(id = 7, null, features)", "Column 'features' holds 1 nulls in"),
        ("array(1.0D, if(id = 7, null, 2.0D))", "Column 'features' holds 1 nulls in"),
        ("array(1.0D)", "Column 'features' has 1 values a row, and the input 'x' takes float32"),
        ("if(id = 7, array(1.0D), features)", "Column 'features' holds values of different lengths"),
        ("array('a', 'b')", "Column 'features' holds values of different lengths or no numbers"),
    ],
)
def test_rows_that_do_not_fit_are_told_of_with_their_column(
    points: Any, models: Any, expression: str, found: str
) -> None:
    df = points.selectExpr("id", f"{expression} as features")
    with pytest.raises(Exception, match=f"DataError: {found}"):
        line_model(models["line"]).transform(df).collect()


def test_transform_is_lazy_and_empty_partitions_stay_empty(spark_local4: Any, points: Any, models: Any) -> None:
    failing = points.selectExpr("if(id >= 0, raise_error('computed'), array(1.0D, 2.0D)) as features")
    result = line_model(models["line"]).transform(failing)
    assert result.columns == ["prediction"]
    with pytest.raises(Exception, match="computed"):
        result.collect()
    assert line_model(models["line"]).transform(points.filter("id = 3")).count() == 1
    assert line_model(models["line"]).transform(points.filter("id < 0")).collect() == []


# --- the task by itself -----------------------------------------------------------------------------------------

WORKER = """
import sys
import keras
import numpy as np
import pyarrow as pa
from tfos_magic import serving

directory = sys.argv[1]
loads = []
load = serving._load
serving._load = lambda path, tags: loads.append(path) or load(path, tags)

def model(weight=1.0):
    made = keras.Sequential([keras.Input((2,), name="x"), keras.layers.Dense(1, use_bias=False)])
    made.layers[-1].set_weights([np.full((2, 1), weight, np.float32)])
    return made

def predict(path, xs, batch_size=100):
    plan = {"export_dir": path, "model_dir": None, "signature": None, "tags": None, "inputs": [("features", "x")],
            "outputs": [("output_0", "p")], "batch_size": batch_size}
    batch = pa.RecordBatch.from_pydict({"k0": pa.array(xs, pa.list_(pa.float64()))})
    (result,) = serving.run_model(b"", plan, iter([batch]))
    return result.column(0).to_pylist()
"""


def as_a_worker(code: str, directory: Path) -> None:
    subprocess.run([sys.executable, "-c", WORKER + textwrap.dedent(code), str(directory)], check=True, timeout=100)


def test_a_worker_loads_a_model_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    as_a_worker(
        """
        path = f"{directory}/m"
        model(1.0).export(path)
        assert predict(path, [[1.0, 2.0]] * 250) == [[3.0]] * 250
        assert predict(path, [[5.0, 5.0]], batch_size=1) == [[10.0]]
        assert loads == [path], loads
        model(2.0).export(path)
        assert predict(path, [[1.0, 2.0]]) == [[6.0]]
        assert loads == [path, path], loads
        """,
        tmp_path,
    )


def test_a_worker_keeps_a_few_models_only(tmp_path: Path) -> None:
    as_a_worker(
        """
        paths = [f"{directory}/{number}.keras" for number in range(serving._KEPT_MODELS + 1)]
        for path in paths:
            model().save(path)
        for path in [*paths, paths[-1], paths[0]]:
            predict(path, [[1.0, 2.0]])
        assert loads == [*paths, paths[0]], loads
        """,
        tmp_path,
    )


# --- saving -----------------------------------------------------------------------------------------------------


def test_stages_come_back_from_disk_alone_and_in_pipelines(
    spark_local4: Any, points: Any, models: Any, tmp_path: Path
) -> None:
    from pyspark.ml import Pipeline, PipelineModel
    from pyspark.ml.feature import SQLTransformer

    offset = 5

    def shifted(args: Any, ctx: Any) -> int:
        return args.start + offset

    estimator = TFEstimator(by_value(shifted), {"start": 1, "shape": (2, 3), "path": Path("/x")}).setEpochs(4)
    estimator.setInputMapping({"features": "x"}).save(str(tmp_path / "estimator"))
    loaded = TFEstimator.load(str(tmp_path / "estimator"))
    assert loaded.train_fn(argparse.Namespace(start=1), None) == 6
    assert loaded.export_fn is None
    assert loaded.args == estimator.args
    assert (loaded.uid, loaded.extractParamMap()) == (estimator.uid, {
        loaded.getParam(param.name): value for param, value in estimator.extractParamMap().items()
    })  # fmt: skip

    select = SQLTransformer(statement="SELECT id, features FROM __THIS__ WHERE id < 10")
    model = line_model(models["line"], keep_columns=True)
    pipelines: dict[str, Any] = {
        "pipeline": Pipeline(stages=[select, estimator]),
        "model": PipelineModel([select, model]),
    }
    for name, stage in pipelines.items():
        stage.write().overwrite().save(str(tmp_path / name))
    again = Pipeline.load(str(tmp_path / "pipeline")).getStages()[1]
    assert isinstance(again, TFEstimator)
    assert again.train_fn(argparse.Namespace(start=2), None) == 7
    result = PipelineModel.load(str(tmp_path / "model")).transform(points)
    assert result.columns == ["id", "features", "prediction"]
    assert result.collect() == pipelines["model"].transform(points).collect()
    assert result.count() == 10
    with pytest.raises(
        DataError, match=r"holds a tfos_magic\.pipeline\.TFEstimator, not a tfos_magic\.pipeline\.TFModel"
    ):
        TFModel.load(str(tmp_path / "estimator"))


def test_arguments_are_readable_json_where_that_brings_them_back(spark_local4: Any, tmp_path: Path) -> None:
    for name, args in {"words": ["p", "--x", "1"], "plain": {"a": [1, {"b": None}]}, "odd": {"t": (1,)}}.items():
        path = tmp_path / name
        TFModel(args).save(str(path))
        (part,) = (path / "metadata").glob("part-*")
        saved = json.loads(part.read_text())["tfos_magic"]["args"]
        assert saved == ({"json": args} if name != "odd" else {"pickle": saved["pickle"]})
        assert TFModel.load(str(path)).args == Namespace(args)


def test_a_whole_pipeline_fits_and_its_model_is_saved_and_loaded_elsewhere(
    spark_local4: Any, points: Any, spark_script: Script, tmp_path: Path
) -> None:
    from pyspark.ml import Pipeline
    from pyspark.ml.feature import VectorAssembler

    df = points.selectExpr("features[0] as a", "features[1] as b", "label")
    estimator = TFEstimator(train_line, {"rate": 1}).setInputMapping({"v": "x", "label": "y"})
    estimator.setExportDir(str(tmp_path / "model")).setBatchSize(200)
    fitted = Pipeline(stages=[VectorAssembler(inputCols=["a", "b"], outputCol="v"), estimator]).fit(df)
    fitted.stages[1].setInputMapping({"v": "x"}).setOutputMapping({"output_0": "p"})
    fitted.save(str(tmp_path / "fitted"))
    code = """
        import sys
        from pyspark.ml import PipelineModel
        from pyspark.sql import SparkSession

        spark = SparkSession.builder.getOrCreate()
        df = spark.createDataFrame([(1.0, 2.0)], ["a", "b"])
        ((prediction,),) = PipelineModel.load(sys.argv[1]).transform(df).collect()
        print(round(prediction[0], 2))
        spark.stop()
    """
    assert spark_script(code, args=(str(tmp_path / "fitted"),)).stdout.strip() == "21.0"


def test_executors_need_not_have_the_package(spark_script: Script, models: Any, tmp_path: Path) -> None:
    site = sysconfig.get_paths()["purelib"]
    bare = tmp_path / "python"  # -S: an editable installation is found by what site-packages' .pth files start
    bare.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{site}" exec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    code = """
        import sys
        from pyspark.sql import SparkSession
        from tfos_magic.pipeline import TFModel

        def import_error(rows):
            try:
                import tfos_magic
                yield "it is there"
            except ModuleNotFoundError as error:
                yield str(error)

        spark = SparkSession.builder.config("spark.pyspark.python", sys.argv[2]).getOrCreate()
        print(spark.sparkContext.parallelize([0], 1).mapPartitions(import_error).collect())
        df = spark.createDataFrame([([1.0, 2.0],)], ["x"])
        print(TFModel({"export_dir": sys.argv[1]}).transform(df).collect())
        spark.stop()
    """
    env = {"PYSPARK_PYTHON": str(bare), "PYSPARK_ENABLE_NAMEDTUPLE_PATCH": "1"}
    done = spark_script(code, args=(models["line"], str(bare)), env=env)
    assert done.stdout.splitlines() == ["[\"No module named 'tfos_magic'\"]", "[Row(output_0=[21.0])]"]


def test_tfoss_names_are_all_here() -> None:
    assert set(pipeline.__all__) <= set(dir(pipeline))


@pytest.mark.slow
@pytest.mark.oldest
def test_with_the_oldest_versions(spark_script: Script, oldest_python: Path, tmp_path: Path) -> None:
    code = """
        import sys
        from pyspark.ml import Pipeline, PipelineModel
        from pyspark.sql import SparkSession
        from tfos_magic.pipeline import TFEstimator

        def train(args, ctx):
            import keras
            import numpy as np
            feed = ctx.get_data_feed(train_mode=True, input_mapping=args.input_mapping)
            xs, ys = [], []
            while not feed.should_stop():
                batch = feed.next_batch(args.batch_size)
                xs.append(batch["x"])
                ys.append(batch["y"])
            weights = np.linalg.lstsq(np.concatenate(xs), np.concatenate(ys), rcond=None)[0]
            model = keras.Sequential([keras.Input((2,), name="x"), keras.layers.Dense(1, use_bias=False)])
            model.layers[-1].set_weights([weights.reshape(2, 1).astype("float32")])
            if ctx.is_chief:
                model.save(args.model_dir)
                model.export(args.export_dir)

        out = sys.argv[1]
        spark = SparkSession.builder.getOrCreate()
        df = spark.range(100).selectExpr("id", "array(id / 10, id % 7) x", "id / 10 + 10 * (id % 7) y")
        estimator = TFEstimator(train, {}).setInputMapping({"x": "x", "y": "y"}).setExportDir(out + "/m")
        estimator.setModelDir(out + "/m.keras")
        pipeline = Pipeline(stages=[estimator])
        pipeline.save(out + "/p")
        fitted = Pipeline.load(out + "/p").fit(df)
        fitted.stages[0].setInputMapping({"x": "x"}).setOutputMapping({"output_0": "p"}).setKeepColumns(True)
        fitted.save(out + "/f")
        loaded = PipelineModel.load(out + "/f")
        for export_dir in (out + "/m", out + "/m.keras"):
            loaded.stages[0].setExportDir(export_dir)
            rows = loaded.transform(df).collect()
            assert [row.id for row in rows] == list(range(100))
            assert all(abs(row.p[0] - row.y) < 0.01 for row in rows)
        print("done")
        spark.stop()
    """
    root = os.path.dirname(os.path.dirname(__file__))
    (tmp_path / "o").mkdir()
    done = spark_script(code, python=oldest_python, env={"PYTHONPATH": root}, args=(str(tmp_path / "o"),))
    assert done.stdout.strip().endswith("done")
