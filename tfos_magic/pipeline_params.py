"""The Params of TFoS's pipeline: a mix-in for each, and what merges them with the user's own arguments.

Runs on: driver.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from pyspark.ml.param import Param, Params, TypeConverters

from tfos_magic.errors import UsageError
from tfos_magic.namespace import Namespace

T = TypeVar("T", bound=Params)


class TFTypeConverters:
    """What ``TypeConverters`` lacks."""

    @staticmethod
    def toDict(value: Any) -> dict[Any, Any]:
        """Return a dict as it is; anything else is a TypeError, as Spark's converters have it."""
        if isinstance(value, dict):
            return value
        raise TypeError(f"Could not convert {value!r} to a dict.")


def _param(name: str, doc: str, converter: Any) -> Param[Any]:
    return Param(Params._dummy(), name, doc, typeConverter=converter)


class _Settable(Params):
    """``_set`` and ``getOrDefault`` with types."""

    def _put(self: T, **values: Any) -> T:
        self._set(**values)
        return self

    def _take(self, param: Param[Any]) -> Any:
        return self.getOrDefault(param)


class HasBatchSize(_Settable):
    """Rows per batch."""

    batch_size = _param("batch_size", "rows per batch", TypeConverters.toInt)

    def setBatchSize(self: Any, value: int) -> Any:
        """Set ``batch_size``."""
        return self._put(batch_size=value)

    def getBatchSize(self) -> int:
        """Return ``batch_size``."""
        return int(self._take(self.batch_size))


class HasClusterSize(_Settable):
    """Nodes in the cluster."""

    cluster_size = _param("cluster_size", "nodes in the cluster, parameter servers included", TypeConverters.toInt)

    def setClusterSize(self: Any, value: int) -> Any:
        """Set ``cluster_size``."""
        return self._put(cluster_size=value)

    def getClusterSize(self) -> int:
        """Return ``cluster_size``."""
        return int(self._take(self.cluster_size))


class HasEpochs(_Settable):
    """How often the rows are fed."""

    epochs = _param("epochs", "how often the rows are fed", TypeConverters.toInt)

    def setEpochs(self: Any, value: int) -> Any:
        """Set ``epochs``."""
        return self._put(epochs=value)

    def getEpochs(self) -> int:
        """Return ``epochs``."""
        return int(self._take(self.epochs))


class HasGraceSecs(_Settable):
    """How long an evaluator may go on after all others; the others are waited for in any case."""

    grace_secs = _param("grace_secs", "seconds that an evaluator may go on after the others", TypeConverters.toInt)

    def setGraceSecs(self: Any, value: int) -> Any:
        """Set ``grace_secs``."""
        return self._put(grace_secs=value)

    def getGraceSecs(self) -> int:
        """Return ``grace_secs``."""
        return int(self._take(self.grace_secs))


class HasInputMapping(_Settable):
    """Column of the DataFrame → input tensor."""

    input_mapping = _param("input_mapping", "DataFrame column -> input tensor", TFTypeConverters.toDict)

    def setInputMapping(self: Any, value: dict[str, str]) -> Any:
        """Set ``input_mapping``."""
        return self._put(input_mapping=value)

    def getInputMapping(self) -> dict[str, str]:
        """Return ``input_mapping``."""
        return dict(self._take(self.input_mapping))


class HasInputMode(_Settable):
    """How the nodes get their rows: Spark feeds them."""

    input_mode = _param("input_mode", "1: Spark feeds the rows", TypeConverters.toInt)

    def setInputMode(self: Any, value: int) -> Any:
        """Set ``input_mode``; only ``InputMode.SPARK`` is possible, as in TFoS."""
        if value != 1:
            raise UsageError(
                f"input_mode={value!r} is not for pipelines: an estimator is given a DataFrame, which Spark feeds.",
                hint="dfutil.saveAsTFRecords(df, path), then TFCluster.run(…, input_mode=InputMode.TENSORFLOW).",
            )
        return self._put(input_mode=value)

    def getInputMode(self) -> int:
        """Return ``input_mode``."""
        return int(self._take(self.input_mode))


class HasMasterNode(_Settable):
    """Job name of the node that leads."""

    master_node = _param("master_node", "job name of the node that leads", TypeConverters.toString)

    def setMasterNode(self: Any, value: str) -> Any:
        """Set ``master_node``."""
        return self._put(master_node=value)

    def getMasterNode(self) -> Any:
        """Return ``master_node``."""
        return self._take(self.master_node)


class HasModelDir(_Settable):
    """Where checkpoints, or a ``.keras`` file, are."""

    model_dir = _param("model_dir", "path of checkpoints, or of a .keras file", TypeConverters.toString)

    def setModelDir(self: Any, value: str) -> Any:
        """Set ``model_dir``."""
        return self._put(model_dir=value)

    def getModelDir(self) -> Any:
        """Return ``model_dir``."""
        return self._take(self.model_dir)


class HasNumPS(_Settable):
    """Parameter servers."""

    num_ps = _param("num_ps", "parameter servers among the nodes", TypeConverters.toInt)
    driver_ps_nodes = _param("driver_ps_nodes", "run parameter servers on the driver", TypeConverters.toBoolean)

    def setNumPS(self: Any, value: int) -> Any:
        """Set ``num_ps``."""
        return self._put(num_ps=value)

    def getNumPS(self) -> int:
        """Return ``num_ps``."""
        return int(self._take(self.num_ps))

    def setDriverPSNodes(self: Any, value: bool) -> Any:
        """Set ``driver_ps_nodes``."""
        return self._put(driver_ps_nodes=value)

    def getDriverPSNodes(self) -> bool:
        """Return ``driver_ps_nodes``."""
        return bool(self._take(self.driver_ps_nodes))


class HasOutputMapping(_Settable):
    """Output tensor → column of the result."""

    output_mapping = _param("output_mapping", "output tensor -> DataFrame column", TFTypeConverters.toDict)

    def setOutputMapping(self: Any, value: dict[str, str]) -> Any:
        """Set ``output_mapping``."""
        return self._put(output_mapping=value)

    def getOutputMapping(self) -> dict[str, str]:
        """Return ``output_mapping``."""
        return dict(self._take(self.output_mapping))


class HasKeepColumns(_Settable):
    """Whether a result has the input's columns as well; not in TFoS."""

    keep_columns = _param("keep_columns", "append to the input's columns, not replace them", TypeConverters.toBoolean)

    def setKeepColumns(self: Any, value: bool) -> Any:
        """Set ``keep_columns``."""
        return self._put(keep_columns=value)

    def getKeepColumns(self) -> bool:
        """Return ``keep_columns``."""
        return bool(self._take(self.keep_columns))


class HasProtocol(_Settable):
    """What TensorFlow's nodes speak: ``grpc``."""

    protocol = _param("protocol", "network protocol of TensorFlow: grpc", TypeConverters.toString)

    def setProtocol(self: Any, value: str) -> Any:
        """Set ``protocol``."""
        if value != "grpc":
            raise UsageError(f"protocol={value!r} cannot be had: TensorFlow has no other than grpc since 2.0.")
        return self._put(protocol=value)

    def getProtocol(self) -> str:
        """Return ``protocol``."""
        return str(self._take(self.protocol))


class HasReaders(_Settable):
    """For the function's own use."""

    readers = _param("readers", "number of reader threads, for the function's own use", TypeConverters.toInt)

    def setReaders(self: Any, value: int) -> Any:
        """Set ``readers``."""
        return self._put(readers=value)

    def getReaders(self) -> int:
        """Return ``readers``."""
        return int(self._take(self.readers))


class HasSteps(_Settable):
    """For the function's own use."""

    steps = _param("steps", "maximum number of steps, for the function's own use", TypeConverters.toInt)

    def setSteps(self: Any, value: int) -> Any:
        """Set ``steps``."""
        return self._put(steps=value)

    def getSteps(self) -> int:
        """Return ``steps``."""
        return int(self._take(self.steps))


class HasTensorboard(_Settable):
    """Whether TensorBoard runs beside the chief."""

    tensorboard = _param("tensorboard", "run TensorBoard beside the chief", TypeConverters.toBoolean)

    def setTensorboard(self: Any, value: bool) -> Any:
        """Set ``tensorboard``."""
        return self._put(tensorboard=value)

    def getTensorboard(self) -> bool:
        """Return ``tensorboard``."""
        return bool(self._take(self.tensorboard))


class HasTFRecordDir(_Settable):
    """For the function's own use."""

    tfrecord_dir = _param("tfrecord_dir", "path of TFRecord files, for the function's own use", TypeConverters.toString)

    def setTFRecordDir(self: Any, value: str) -> Any:
        """Set ``tfrecord_dir``."""
        return self._put(tfrecord_dir=value)

    def getTFRecordDir(self) -> Any:
        """Return ``tfrecord_dir``."""
        return self._take(self.tfrecord_dir)


class HasExportDir(_Settable):
    """Where the SavedModel is."""

    export_dir = _param("export_dir", "directory of a SavedModel, or path of a .keras file", TypeConverters.toString)

    def setExportDir(self: Any, value: str) -> Any:
        """Set ``export_dir``."""
        return self._put(export_dir=value)

    def getExportDir(self) -> Any:
        """Return ``export_dir``."""
        return self._take(self.export_dir)


class HasSignatureDefKey(_Settable):
    """Which of the SavedModel's signatures is run."""

    signature_def_key = _param("signature_def_key", "name of the SavedModel's signature", TypeConverters.toString)

    def setSignatureDefKey(self: Any, value: str) -> Any:
        """Set ``signature_def_key``."""
        return self._put(signature_def_key=value)

    def getSignatureDefKey(self) -> Any:
        """Return ``signature_def_key``."""
        return self._take(self.signature_def_key)


class HasTagSet(_Settable):
    """Which of the SavedModel's graphs is loaded."""

    tag_set = _param("tag_set", "tags of the SavedModel's graph, separated by commas", TypeConverters.toString)

    def setTagSet(self: Any, value: str) -> Any:
        """Set ``tag_set``."""
        return self._put(tag_set=value)

    def getTagSet(self) -> Any:
        """Return ``tag_set``."""
        return self._take(self.tag_set)


class TFParams(Params):
    """Params and the user's own arguments together.

    Attributes
    ----------
    args : Namespace
    """

    args: Namespace

    def merge_args_params(self) -> Namespace:
        """Return the arguments with all Params added.

        A Param that was set counts, then the argument of that name, then the Param's default. (In TFoS the default
        takes the argument's place.)
        """
        merged = copy.copy(self.args)
        for param in self.params:
            if self.isSet(param) or param.name not in vars(merged):
                setattr(merged, param.name, self.getOrDefault(param))
        return merged
