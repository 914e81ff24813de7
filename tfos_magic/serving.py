"""A trained model over the rows of a DataFrame: the Spark tasks behind ``TFModel.transform``.

Runs on: executor, in a Python worker, from the shipped package.

A worker loads a model once, and keeps it for later tasks until the model's files change. Columns come as Arrow and go
to TensorFlow as NumPy arrays, in the dtype and shape that the signature has.
"""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from tfos_magic.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from tfos_magic.feed.columns import Array

_KEPT = "_tfos_magic_served_models"  # not below the package's name: what is there goes with each call
_KEPT_MODELS = 4
_KERAS_FILES = (".keras", ".h5")
_DEFAULT_SIGNATURE = "serving_default"
_SPARK_TYPES = {
    "float16": "float",
    "bfloat16": "float",
    "float32": "float",
    "float64": "double",
    "int8": "tinyint",
    "uint8": "smallint",
    "int16": "smallint",
    "uint16": "int",
    "int32": "int",
    "uint32": "bigint",
    "int64": "bigint",
    "bool": "boolean",
    "string": "binary",
}
_ARROW_TYPES = {
    "float": "float32",
    "double": "float64",
    "tinyint": "int8",
    "smallint": "int16",
    "int": "int32",
    "bigint": "int64",
    "boolean": "bool",
    "binary": "binary",
}


@dataclass(frozen=True)
class Tensor:
    """An input or output of a signature.

    Attributes
    ----------
    name, dtype : str
    shape : list of (int or None), or None
        The first dimension is the rows'; None if not even the rank is known.
    """

    name: str
    dtype: str
    shape: list[int | None] | None

    @classmethod
    def of(cls, name: str, spec: Any) -> Tensor:
        """Return what a ``tf.TensorSpec`` says."""
        shape = None if spec.shape.rank is None else spec.shape.as_list()
        return cls(name, spec.dtype.name, shape)


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes
    ----------
    inputs, outputs : list of Tensor
    call : callable
        Takes the inputs by name, returns a dict of the outputs.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    call: Callable[..., Mapping[str, Any]]


# --- the tasks --------------------------------------------------------------------------------------------------


def describe_model(archive: bytes, plan: dict[str, Any], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield one row: the model's inputs and outputs as JSON, or what is wrong with it.

    Parameters
    ----------
    archive : bytes
        The package; mounted already, so not used here.
    plan : dict
        ``export_dir``, ``model_dir``, ``signature``, ``tags``.
    batches : iterator of pyarrow.RecordBatch
        One row, of no meaning.
    """
    import pyarrow as pa

    for _ in batches:
        summary, problem = "", ""
        try:
            model = load(plan)
            summary = json.dumps({"inputs": list(map(vars, model.inputs)), "outputs": list(map(vars, model.outputs))})
        except DataError as error:
            problem = json.dumps({"fact": error.fact, "cause": error.cause, "hint": error.hint})
        yield pa.RecordBatch.from_pydict({"summary": [summary], "problem": [problem]})


def run_model(archive: bytes, plan: dict[str, Any], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the kept columns and the model's outputs for each batch of rows.

    Parameters
    ----------
    archive : bytes
        The package; mounted already, so not used here.
    plan : dict
        As for :func:`describe_model`; ``inputs``, pairs of a column's name and its tensor, in the order of the last
        columns of each batch; ``outputs``, pairs of a tensor and its column; ``batch_size``.
    batches : iterator of pyarrow.RecordBatch
        Columns to keep, if any, then those for the model.
    """
    import pyarrow as pa

    model = None
    for batch in batches:
        model = model or load(plan)
        kept = batch.num_columns - len(plan["inputs"])
        results = _outputs(model, plan, batch.columns[kept:], batch.num_rows)
        arrays = [*batch.columns[:kept], *results]
        yield pa.RecordBatch.from_arrays(arrays, [f"c{index}" for index in range(len(arrays))])


def _outputs(model: Model, plan: dict[str, Any], columns: Sequence[pa.Array], row_count: int) -> list[pa.Array]:
    import pyarrow as pa

    inputs = {tensor.name: tensor for tensor in model.inputs}
    named = [(name, inputs[tensor], column) for (name, tensor), column in zip(plan["inputs"], columns, strict=True)]
    wanted = {tensor.name: tensor for tensor in model.outputs}
    parts: dict[str, list[pa.Array]] = {tensor: [] for tensor, _ in plan["outputs"]}
    for start in range(0, row_count, plan["batch_size"]):
        rows = min(plan["batch_size"], row_count - start)
        given = {tensor.name: _tensor(name, column.slice(start, rows), tensor) for name, tensor, column in named}
        results = model.call(**given)
        for name, arrays in parts.items():
            arrays.append(_column(wanted[name], results[name], rows))
    return [pa.concat_arrays(arrays) for arrays in parts.values()]


# --- columns to tensors, tensors to columns ---------------------------------------------------------------------


def spark_type(tensor: Tensor) -> str:
    """Return the type of the column that an output becomes.

    Raises
    ------
    DataError
        Its dtype or its number of dimensions has no column.
    """
    element = _SPARK_TYPES.get(tensor.dtype)
    if element is None or not tensor.shape:
        what = f"the dtype {tensor.dtype}" if element is None else "no row dimension, or one that is not known"
        raise DataError(
            f"Output '{tensor.name}' has {what}, so it cannot be a column.",
            hint="Give the signature's outputs a dtype such as float32 and a shape such as (None, 10).",
        )
    depth = len(tensor.shape) - 1
    return "array<" * depth + element + ">" * depth


def _tensor(name: str, column: pa.Array, tensor: Tensor) -> Any:
    import numpy as np
    import tensorflow as tf

    from tfos_magic.feed.columns import to_numpy

    _refuse_nulls(name, column)
    array = to_numpy(column)
    if tensor.dtype != "string":
        dtype = np.dtype(tf.dtypes.as_dtype(tensor.dtype).as_numpy_dtype)
        if array.dtype == object or (array.dtype.kind == "f" and dtype.kind in "iub"):
            held = "values of different lengths or no numbers" if array.dtype == object else str(array.dtype)
            raise DataError(
                f"Column '{name}' holds {held}, and the input '{tensor.name}' takes {_described(tensor)}.",
                hint=f'Cast it before transform: df.withColumn("{name}", df["{name}"].cast(…)).',
            )
        array = array.astype(dtype, copy=False)
    return tf.constant(_reshaped(name, array, tensor), tensor.dtype)


def _refuse_nulls(name: str, column: pa.Array) -> None:
    values, count = column, column.null_count
    while hasattr(values, "flatten") and not count and hasattr(values.type, "value_type"):
        values = values.flatten()
        count = values.null_count
    if count:
        raise DataError(
            f"Column '{name}' holds {count:,} nulls in {len(column):,} rows.",
            cause="A tensor has no null.",
            hint=f'Drop those rows: df.dropna(subset=["{name}"]), or fill them: df.fillna({{"{name}": 0}}).',
        )


def _reshaped(name: str, array: Array, tensor: Tensor) -> Array:
    """Return the array in the input's shape: Spark's arrays are flat, and TFoS's models take images."""
    if tensor.shape is None or _fits(array, tensor.shape):
        return array
    shape = [len(array), *(-1 if size is None else size for size in tensor.shape[1:])]
    try:
        return array.reshape(shape)
    except ValueError as error:
        raise DataError(
            f"Column '{name}' has {array[0].size:,} values a row, and the input '{tensor.name}' takes "
            f"{_described(tensor)}.",
            hint="Set input_mapping to the column that the model was trained with.",
        ) from error


def _fits(array: Array, shape: Sequence[int | None]) -> bool:
    return len(shape) == array.ndim and all(
        size in (None, found) for size, found in zip(shape[1:], array.shape[1:], strict=True)
    )


def _described(tensor: Tensor) -> str:
    shape = ", ".join("any" if size is None else str(size) for size in (tensor.shape or [])[1:])
    return f"{tensor.dtype} ({shape}) a row" if shape else f"one {tensor.dtype} a row"


def _column(tensor: Tensor, result: Any, row_count: int) -> pa.Array:
    import numpy as np
    import pyarrow as pa

    array = np.asarray(result.numpy())
    if array.ndim != len(tensor.shape or ()) or len(array) != row_count:
        raise DataError(
            f"Output '{tensor.name}' has the shape {array.shape} for {row_count:,} rows.",
            cause="Each row needs one result of its own.",
            hint="Leave it out of output_mapping, or export a model that computes row by row.",
        )
    kind = pa.type_for_alias(_ARROW_TYPES[_SPARK_TYPES[tensor.dtype]])
    flat = array.ravel()
    values = pa.array(flat.tolist(), kind) if array.dtype == object else pa.array(flat.astype(kind.to_pandas_dtype()))
    for level in range(array.ndim - 1, 0, -1):
        outer, inner = int(np.prod(array.shape[:level])), array.shape[level]
        values = pa.ListArray.from_arrays(pa.array(np.arange(outer + 1, dtype=np.int32) * np.int32(inner)), values)
    return values


# --- loading ----------------------------------------------------------------------------------------------------


def load(plan: Mapping[str, Any]) -> Model:
    """Return the model, as this worker has it or newly loaded.

    Parameters
    ----------
    plan : mapping
        See :func:`describe_model`.

    Raises
    ------
    DataError
        There is no model at the path, or it has no such signature.
    """
    path = _find(plan)
    key = (path, plan["tags"])
    stamp = _stamp(path)
    kept = _kept()
    if key not in kept or kept[key][0] != stamp:
        kept.pop(key, None)
        while len(kept) >= _KEPT_MODELS:
            kept.pop(next(iter(kept)))
        kept[key] = (stamp, _load(path, plan["tags"]))
    loaded = kept[key][1]
    return _keras_model(loaded) if _is_keras_file(path) else _saved_model(loaded, path, plan["signature"])


def _kept() -> dict[Any, tuple[Any, Any]]:
    """Return the models of this worker: process-wide, because a worker's process is what they are kept for."""
    holder = sys.modules.setdefault(_KEPT, types.ModuleType(_KEPT))
    models: dict[Any, tuple[Any, Any]] = vars(holder).setdefault("models", {})
    return models


def _find(plan: Mapping[str, Any]) -> str:
    """Return the path of the SavedModel, or of the ``.keras`` file, that `plan` means."""
    from tfos_magic.tfrecords.files import files_for

    path = plan["export_dir"] or plan["model_dir"]
    files = files_for(path)
    if files.exists(path) and not files.is_dir(path) and _is_keras_file(path):
        return str(path)
    if files.exists(f"{path}/saved_model.pb") or files.exists(f"{path}/saved_model.pbtxt"):
        return str(path)
    found = sorted(name for name in files.names(path) if _is_keras_file(name)) if files.is_dir(path) else []
    if len(found) == 1:
        return f"{path}/{found[0]}"
    raise DataError(
        f"There is no model at {path}" + (f", but {len(found)} .keras files: {', '.join(found)}." if found else "."),
        cause="" if found else "The directory has no saved_model.pb, or this executor does not see it.",
        hint="Write one with model.export(path) or model.save(path + '.keras'), where all machines see it.",
    )


def _is_keras_file(path: str) -> bool:
    return PurePosixPath(path).suffix in _KERAS_FILES


def _stamp(path: str) -> tuple[Any, ...]:
    """Return what changes when the model's files do."""
    from tfos_magic.tfrecords.files import files_for

    files = files_for(path)
    if not files.is_dir(path):
        return files.stamp(path)
    variables = f"{path}/variables"
    names = sorted(files.names(variables)) if files.is_dir(variables) else []
    places = [*(f"{path}/{name}" for name in sorted(files.names(path))), *(f"{variables}/{name}" for name in names)]
    return tuple(files.stamp(place) for place in places if not files.is_dir(place))


def _load(path: str, tags: str | None) -> Any:
    _choose_gpus()
    import tensorflow as tf

    if _is_keras_file(path):
        return _load_keras_file(path)
    return tf.saved_model.load(path, tags=[tag.strip() for tag in tags.split(",")] if tags else None)


def _load_keras_file(path: str) -> Any:
    """Return a Keras model, a function that runs it, and the specs of its inputs, structured as it takes them."""
    import keras
    import tensorflow as tf

    model = keras.models.load_model(path, compile=False)
    if not getattr(model, "inputs", None):
        raise DataError(
            f"The model in {path} does not say what its inputs are.",
            cause="It is a class of its own, which Keras builds when it is first called.",
            hint="Write it with model.export(path), and set export_dir.",
        )
    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    specs = tf.nest.map_structure(lambda tensor: tf.TensorSpec(tensor.shape, tensor.dtype, tensor.name), inputs)
    # Without AutoGraph, as Keras exports: it writes files that a Python worker, when it is killed, leaves behind.
    return model, tf.function(lambda given: model(given, training=False), autograph=False), specs


def _choose_gpus() -> None:
    """Let TensorFlow have the task's GPUs only, and of their memory what it needs: other workers share them."""
    from pyspark import TaskContext

    context = TaskContext.get()
    assigned = context.resources().get("gpu") if context is not None else None
    if assigned is not None and "tensorflow" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(assigned.addresses)
    import tensorflow as tf

    for device in tf.config.list_physical_devices("GPU"):
        try:
            tf.config.experimental.set_memory_growth(device, True)
        except RuntimeError:  # in use already, by what has run in this worker before
            return


def _saved_model(loaded: Any, path: str, signature: str | None) -> Model:
    name = signature or _DEFAULT_SIGNATURE
    if name not in loaded.signatures:
        raise DataError(
            f"The model at {path} has no signature '{name}' but {', '.join(loaded.signatures) or 'none at all'}.",
            hint="setSignatureDefKey(…) takes one of these; model.export(path) writes 'serving_default'.",
        )
    function = loaded.signatures[name]
    inputs = [Tensor.of(key, spec) for key, spec in function.structured_input_signature[1].items()]
    outputs = [Tensor.of(key, spec) for key, spec in sorted(function.structured_outputs.items())]
    return Model(inputs, outputs, function)


def _keras_model(loaded: Any) -> Model:
    """Return the model with the names that its ``export`` would give to inputs and outputs."""
    import tensorflow as tf

    _, function, specs = loaded
    flat = tf.nest.flatten(specs)
    made = _named(function.get_concrete_function(specs).structured_outputs)

    def call(**inputs: Any) -> Mapping[str, Any]:
        return _named(function(tf.nest.pack_sequence_as(specs, [inputs[spec.name] for spec in flat])))

    outputs = [Tensor.of(name, spec) for name, spec in sorted(made.items())]
    return Model([Tensor.of(spec.name, spec) for spec in flat], outputs, call)


def _named(outputs: Any) -> dict[str, Any]:
    if isinstance(outputs, dict):
        return outputs
    listed = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return {f"output_{index}": output for index, output in enumerate(listed)}
