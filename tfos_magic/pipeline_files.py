"""How the pipeline's stages are saved and loaded: Spark's own metadata, with the arguments and functions in it.

Runs on: driver.

Functions are stored as they travel to the nodes: those of a notebook or a script by value, with their source; those of
a module by its name. **Loading a stage that holds a function runs code from the file**, as unpickling does: load stages
only from those you trust.
"""

from __future__ import annotations

import base64
import json
import pickle
from typing import Any, Protocol

import cloudpickle
from pyspark.ml.util import DefaultParamsReader, DefaultParamsWriter, MLReader, MLWriter

from tfos_magic import shipping
from tfos_magic.errors import DataError, EnvironmentMismatchError
from tfos_magic.namespace import Namespace

_OURS = "tfos_magic"


class Stage(Protocol):
    """What can be saved here."""

    @classmethod
    def _from_saved(cls, saved: dict[str, Any]) -> Any:
        """Return a new stage from what `_to_saved` gave."""

    def _to_saved(self) -> dict[str, Any]:
        """Return all that is no Param, as JSON has it."""


class StageWriter(MLWriter):
    """Writes one stage."""

    def __init__(self, stage: Any) -> None:
        super().__init__()
        self._stage = stage

    def saveImpl(self, path: str) -> None:
        """Write the stage; Spark's ``save`` has looked after what was at `path`."""
        DefaultParamsWriter.saveMetadata(self._stage, path, self.sc, {_OURS: self._stage._to_saved()})


class StageReader(MLReader[Any]):
    """Reads one stage."""

    def __init__(self, kind: type[Any]) -> None:
        super().__init__()
        self._kind = kind

    def load(self, path: str) -> Any:
        """Return the stage that was saved at `path`.

        Raises
        ------
        DataError
            There is another kind of stage.
        EnvironmentMismatchError
            It holds a function, and was saved under another minor version of Python.
        """
        metadata = DefaultParamsReader.loadMetadata(path, self.sc)
        expected = f"{self._kind.__module__}.{self._kind.__name__}"
        if metadata["class"] != expected or _OURS not in metadata:
            raise DataError(f"{path} holds a {metadata['class']}, not a {expected}.", hint="Load it with its class.")
        try:
            stage: Any = self._kind._from_saved(metadata[_OURS])
        except EnvironmentMismatchError as error:
            raise EnvironmentMismatchError(
                f"The function in {path} was saved under another minor version of Python.",
                cause="Code cannot travel between minor versions of Python.",
                hint="Load it with the Python that saved it, or make the estimator anew from its source.",
            ) from error
        stage._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(stage, metadata)
        return stage


def function_to_saved(function: Any) -> str | None:
    """Return a function as text."""
    return None if function is None else _text(shipping.pack(function).data)


def function_from_saved(saved: str | None) -> Any:
    """Inverse of :func:`function_to_saved`; runs code from the file."""
    return None if saved is None else shipping.unpack(base64.b64decode(saved))


def args_to_saved(args: Namespace) -> dict[str, Any]:
    """Return arguments as JSON has them, pickled where JSON would not bring them back equal."""
    plain: Any = args.argv if args.argv else vars(args)
    try:
        if json.loads(json.dumps(plain)) == plain:
            return {"json": plain}
    except (TypeError, ValueError):
        pass
    return {"pickle": _text(cloudpickle.dumps(plain))}


def args_from_saved(saved: dict[str, Any]) -> Namespace:
    """Inverse of :func:`args_to_saved`."""
    return Namespace(saved["json"] if "json" in saved else pickle.loads(base64.b64decode(saved["pickle"])))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
