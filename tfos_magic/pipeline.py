"""TFoS's pipeline: TensorFlow as an Estimator and a Model of ``pyspark.ml``.

Runs on: driver.

    estimator = (
        TFEstimator(train_fn, {"learning_rate": 0.1})       train_fn(args, ctx), as for TFCluster.run
        .setInputMapping({"features": "x", "label": "y"})
        .setClusterSize(4).setEpochs(3).setExportDir("/shared/model")
    )
    model = estimator.fit(train_df)                         trains; train_fn has written the model to args.export_dir
    model.setInputMapping({"features": "x"}).setOutputMapping({"output_0": "prediction"})
    model.transform(test_df)                                lazy; each Spark task runs the model by itself

In ``train_fn``: ``feed = ctx.get_data_feed(train_mode=True, input_mapping=args.input_mapping)``.

What is different from TFoS: ``export_fn``, which TFoS refuses under TensorFlow 2, works with a DeprecationWarning;
a mapping that is empty means all columns, and tensors of equal names; ``setKeepColumns(True)`` appends the outputs to
the input's columns, as Spark's own models do; and the output columns have the types of the model's outputs.
"""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

from pyspark.ml import Estimator, Model
from pyspark.ml.util import MLReadable, MLWritable

from tfos_magic import TFCluster, TFParallel, pipeline_files, serving, session, tasks
from tfos_magic.errors import UsageError
from tfos_magic.feed.columns import unknown_column
from tfos_magic.namespace import Namespace
from tfos_magic.pipeline_params import (
    HasBatchSize,
    HasClusterSize,
    HasEpochs,
    HasExportDir,
    HasGraceSecs,
    HasInputMapping,
    HasInputMode,
    HasKeepColumns,
    HasMasterNode,
    HasModelDir,
    HasNumPS,
    HasOutputMapping,
    HasProtocol,
    HasReaders,
    HasSignatureDefKey,
    HasSteps,
    HasTagSet,
    HasTensorboard,
    HasTFRecordDir,
    TFParams,
    TFTypeConverters,
)
from tfos_magic.tfrecords import files

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = [
    "HasBatchSize",
    "HasClusterSize",
    "HasEpochs",
    "HasExportDir",
    "HasGraceSecs",
    "HasInputMapping",
    "HasInputMode",
    "HasKeepColumns",
    "HasMasterNode",
    "HasModelDir",
    "HasNumPS",
    "HasOutputMapping",
    "HasProtocol",
    "HasReaders",
    "HasSignatureDefKey",
    "HasSteps",
    "HasTFRecordDir",
    "HasTagSet",
    "HasTensorboard",
    "Namespace",
    "TFEstimator",
    "TFModel",
    "TFParams",
    "TFTypeConverters",
]

_SERVING = "tfos_magic.serving:"


class _Saved(MLReadable[Any], MLWritable):
    """Saving and loading, alone and inside a Pipeline; see :mod:`tfos_magic.pipeline_files`."""

    def write(self) -> pipeline_files.StageWriter:
        """Return the writer; ``stage.save(path)`` is the short form."""
        return pipeline_files.StageWriter(self)

    @classmethod
    def read(cls) -> pipeline_files.StageReader:
        """Return the reader; ``TFEstimator.load(path)`` is the short form. Load only what you trust: it runs code."""
        return pipeline_files.StageReader(cls)


class TFEstimator(
    Estimator[Any],
    TFParams,
    HasInputMapping,
    HasClusterSize,
    HasNumPS,
    HasInputMode,
    HasMasterNode,
    HasProtocol,
    HasGraceSecs,
    HasTensorboard,
    HasModelDir,
    HasExportDir,
    HasTFRecordDir,
    HasBatchSize,
    HasEpochs,
    HasReaders,
    HasSteps,
    _Saved,
):
    """Trains a TensorFlow model on a cluster of nodes that Spark feeds.

    ``TFEstimator.load`` runs code from the file: load only from those you trust.

    Parameters
    ----------
    train_fn : callable(args, ctx)
        Runs on each node. It writes the model, e.g. ``model.export(args.export_dir)`` where ``ctx.is_chief``.
    tf_args : dict, argparse.Namespace or list of str
        Its arguments. Params are added to them, see :meth:`merge_args_params`; a list becomes ``sys.argv`` as it is.
    export_fn : callable(args), optional
        Runs on one node after the training. Deprecated: let `train_fn` write the model.
    """

    def __init__(self, train_fn: Any, tf_args: Any, export_fn: Any = None) -> None:
        super().__init__()
        self.train_fn = train_fn
        self.args = Namespace(tf_args)
        self.export_fn = export_fn
        self._setDefault(
            input_mapping={},
            cluster_size=1,
            num_ps=0,
            driver_ps_nodes=False,
            input_mode=TFCluster.InputMode.SPARK,
            master_node="chief",
            protocol="grpc",
            tensorboard=False,
            model_dir=None,
            export_dir=None,
            tfrecord_dir=None,
            batch_size=100,
            epochs=1,
            readers=1,
            steps=1000,
            grace_secs=30,
        )

    def _fit(self, dataset: DataFrame) -> TFModel:
        """Train, and return a TFModel with the same arguments and Params.

        The columns of ``input_mapping`` are fed, in the order of their names; all columns if it is empty.
        """
        spark = session.as_session(dataset.sparkSession, "the DataFrame's session")
        merged: Any = self.merge_args_params()
        mapping = merged.input_mapping
        for name in mapping:
            if name not in dataset.columns:
                raise unknown_column(name, dataset.columns)
        rows = dataset.select(*(f"`{name}`" for name in sorted(mapping))) if mapping else dataset
        self._train(spark, rows, merged)
        if self.export_fn is not None:
            self._export(spark, merged)
        return self._copyValues(TFModel(self.args))

    def _train(self, spark: SparkSession, rows: DataFrame, merged: Any) -> None:
        with TFCluster.run(
            spark,
            self.train_fn,
            merged.argv or merged,
            merged.cluster_size,
            merged.num_ps,
            merged.tensorboard,
            TFCluster.InputMode.SPARK,
            log_dir=merged.model_dir,
            driver_ps_nodes=merged.driver_ps_nodes,
            master_node=merged.master_node,
        ) as cluster:
            cluster.train(rows, merged.epochs)
            cluster.shutdown(grace_secs=merged.grace_secs)

    def _export(self, spark: SparkSession, merged: Any) -> None:
        warnings.warn(
            "export_fn is TensorFlowOnSpark's for TensorFlow 1; let train_fn write the model where ctx.is_chief.",
            DeprecationWarning,
            stacklevel=4,
        )
        export_fn = self.export_fn

        def export(args: Any, ctx: Any) -> None:
            export_fn(args)

        TFParallel.run(spark, export, merged.argv or merged, 1)

    def _to_saved(self) -> dict[str, Any]:
        return {
            "train_fn": pipeline_files.function_to_saved(self.train_fn),
            "export_fn": pipeline_files.function_to_saved(self.export_fn),
            "args": pipeline_files.args_to_saved(self.args),
        }

    @classmethod
    def _from_saved(cls, saved: dict[str, Any]) -> TFEstimator:
        train_fn, export_fn = (pipeline_files.function_from_saved(saved[name]) for name in ("train_fn", "export_fn"))
        args: Any = pipeline_files.args_from_saved(saved["args"])
        return cls(train_fn, args.argv or args, export_fn)


class TFModel(
    Model,
    TFParams,
    HasInputMapping,
    HasOutputMapping,
    HasKeepColumns,
    HasBatchSize,
    HasModelDir,
    HasExportDir,
    HasSignatureDefKey,
    HasTagSet,
    _Saved,
):
    """Runs a model that is on disk over the rows of a DataFrame.

    Each Spark task runs the model by itself, so it must fit into an executor's memory; a Python worker loads it once,
    and again when its files have changed. ``save`` stores where the model is, not the model itself.

    Parameters
    ----------
    tf_args : dict, argparse.Namespace or list of str
        Arguments that stand in for Params that are not set, e.g. ``{"export_dir": path}``.

    Notes
    -----
    The model is the SavedModel (or the ``.keras`` file) at ``export_dir``, else at ``model_dir``.
    ``signature_def_key`` is by default ``serving_default``, ``tag_set`` what the SavedModel has.
    """

    def __init__(self, tf_args: Any) -> None:
        super().__init__()
        self.args = Namespace(tf_args)
        self._setDefault(
            input_mapping={},
            output_mapping={},
            keep_columns=False,
            batch_size=100,
            model_dir=None,
            export_dir=None,
            signature_def_key=None,
            tag_set=None,
        )

    def _transform(self, dataset: DataFrame) -> DataFrame:
        """Return the outputs of the model, one row for each row of `dataset`, in its order.

        Lazy but for one task, which loads the model to learn its inputs and outputs.

        Columns
        -------
        Those of ``output_mapping``, in the order of the tensors' names; before them, with ``keep_columns``, the
        input's. A row of a tensor of shape (n, k) is an array, of (n, k, m) an array of arrays; text is binary.
        """
        spark = session.as_session(dataset.sparkSession, "the DataFrame's session")
        merged: Any = self.merge_args_params()
        plan = _model_plan(spark, merged)
        model = _describe(spark, plan)
        inputs = _pairs(merged.input_mapping, model["inputs"], dataset.columns)
        outputs = _outputs(merged.output_mapping, model["outputs"])
        kept = list(dataset.columns) if merged.keep_columns else []
        types = [(column, serving.spark_type(model["outputs"][tensor])) for tensor, column in outputs]
        twins = sorted({column for column, _ in types} & set(kept))
        if twins:
            raise UsageError(
                f"The DataFrame has a column '{twins[0]}' already.", hint="Name another one in output_mapping."
            )
        plan |= {"inputs": inputs, "outputs": outputs, "batch_size": merged.batch_size}
        given = _columns(dataset, kept, [column for column, _ in inputs])
        return given.mapInArrow(tasks.task(_SERVING + "run_model", plan), _schema(dataset, kept, types))

    def _to_saved(self) -> dict[str, Any]:
        return {"args": pipeline_files.args_to_saved(self.args)}

    @classmethod
    def _from_saved(cls, saved: dict[str, Any]) -> TFModel:
        args = pipeline_files.args_from_saved(saved["args"])
        return cls(args.argv or args)


# --- transform ----------------------------------------------------------------------------------------------------


def _model_plan(spark: SparkSession, merged: Any) -> dict[str, Any]:
    if not (merged.export_dir or merged.model_dir):
        raise UsageError(
            "Neither export_dir nor model_dir is set, so there is no model.",
            hint="model.setExportDir(path), with what model.export(path) has written.",
        )
    default = session.default_file_system(spark.sparkContext)

    def absolute(path: str | None) -> str | None:
        return files.absolute(path, default) if path else None

    return {
        "export_dir": absolute(merged.export_dir),
        "model_dir": absolute(merged.model_dir),
        "signature": merged.signature_def_key,
        "tags": merged.tag_set,
    }


def _describe(spark: SparkSession, plan: dict[str, Any]) -> dict[str, dict[str, serving.Tensor]]:
    """Return the model's inputs and outputs by name; an executor says them, because it must see the model anyway."""
    described = tasks.one_each(spark, 1, _SERVING + "describe_model", plan, "summary string, problem string")
    (row,) = tasks.collect(described, f"the model at {plan['export_dir'] or plan['model_dir']}")
    found = json.loads(row.summary)
    return {part: {each["name"]: serving.Tensor(**each) for each in found[part]} for part in ("inputs", "outputs")}


def _pairs(mapping: dict[str, str], inputs: dict[str, serving.Tensor], columns: list[str]) -> list[tuple[str, str]]:
    """Return column and tensor of every input."""
    chosen = mapping or {name: name for name in inputs}
    pairs = [(column, tensor.removesuffix(":0")) for column, tensor in sorted(chosen.items())]
    tensors = [tensor for _, tensor in pairs]
    if sorted(tensors) != sorted(inputs):
        raise UsageError(
            f"input_mapping gives the tensors {', '.join(tensors)}; the model takes {', '.join(inputs)}.",
            hint="setInputMapping({" + ", ".join(f"'<column>': '{name}'" for name in inputs) + "}).",
        )
    for column, _ in pairs:
        if column not in columns:
            raise unknown_column(column, columns)
    return pairs


def _outputs(mapping: dict[str, str], outputs: dict[str, serving.Tensor]) -> list[tuple[str, str]]:
    """Return tensor and column of every output that is wanted."""
    chosen = {tensor.removesuffix(":0"): column for tensor, column in mapping.items()} or {n: n for n in outputs}
    unknown = sorted(set(chosen) - set(outputs))
    if unknown:
        raise UsageError(
            f"output_mapping names the tensor {unknown[0]}; the model gives {', '.join(outputs)}.",
            hint=f"setOutputMapping({{'{next(iter(outputs))}': '<column>'}}).",
        )
    return sorted(chosen.items())


def _columns(dataset: DataFrame, kept: list[str], inputs: list[str]) -> DataFrame:
    """Return the columns to keep and then those for the model, ML vectors as arrays.

    All by number, because ``mapInArrow`` cannot find a column with a dot in its name.
    """
    from pyspark.ml.functions import vector_to_array
    from pyspark.sql import functions

    numbered = dataset.toDF(*(f"c{index}" for index in range(len(dataset.columns))))
    places = {name: functions.col(f"c{index}") for index, name in enumerate(dataset.columns)}
    types = dict(dataset.dtypes)
    chosen = [places[name] for name in kept]
    for name in inputs:
        column = places[name]
        if types[name] == "vector":
            # The function refuses null; a null is told of with the column's name.
            column = functions.when(column.isNotNull(), vector_to_array(column, dtype="float32"))
        chosen.append(column)
    return numbered.select(*(column.alias(f"k{index}") for index, column in enumerate(chosen)))


def _schema(dataset: DataFrame, kept: list[str], outputs: list[tuple[str, str]]) -> Any:
    from pyspark.sql.types import StructField, StructType

    new = dataset.sparkSession.createDataFrame([], ", ".join(f"o{i} {kind}" for i, (_, kind) in enumerate(outputs)))
    fields = [dataset.schema[name] for name in kept]
    for (name, _), field in zip(outputs, new.schema.fields, strict=True):
        fields.append(StructField(name, field.dataType))
    return StructType(fields)
