"""``--save DIR``: the chief leaves the trained models where others find them.

Runs on: executors (chief).

    DIR/model.keras                 keras.models.load_model, in %%tfos_infer or anywhere
    DIR/model/1/saved_model.pb      TensorFlow Serving's layout: its base path is DIR/model
    DIR/model-2.keras, …            the second model that was given to ctx.distribute

Each is made in a scratch directory and then takes its place, so that what was there before stays until that is whole.
"""

from __future__ import annotations

import inspect
import logging
import os
import posixpath
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from tfos_magic.training.directories import PARTIAL


def save_models(models: Sequence[Any], directory: str, tell: Callable[[str, int], None]) -> None:
    """Save each model in both forms; what one cannot have is told, and the others go on.

    Parameters
    ----------
    models : sequence of keras.Model
    directory : str
        A path, or what ``tf.io.gfile`` opens.
    tell : callable(str, int)
        Takes what was done, or could not be, and its level as :mod:`logging` has it.
    """
    for number, model in enumerate(models, 1):
        name = "model" if number == 1 else f"model-{number}"
        with tempfile.TemporaryDirectory(prefix="tfos-save-") as scratch:
            made, target = os.path.join(scratch, name), posixpath.join(directory, name)
            _attempt(_save_keras, model, f"{made}.keras", f"{target}.keras", tell)
            _attempt(_save_serving, model, made, posixpath.join(target, "1"), tell)


def _attempt(
    save: Callable[[Any, str, str], None], model: Any, made: str, target: str, tell: Callable[[str, int], None]
) -> None:
    try:
        save(model, made, target)
    except Exception as error:  # Keras raises anything for models that it cannot describe; the result must not be lost
        reason = " ".join(str(error).split())
        tell(f"Not saved to {target}: {type(error).__name__}: {reason[:300]}", logging.WARNING)
    else:
        tell(f"Saved to {target}.", logging.INFO)


def _save_keras(model: Any, made: str, target: str) -> None:
    import tensorflow as tf

    model.save(made)
    tf.io.gfile.copy(made, target + PARTIAL, overwrite=True)
    tf.io.gfile.rename(target + PARTIAL, target, overwrite=True)


def _save_serving(model: Any, made: str, target: str) -> None:
    import tensorflow as tf

    quiet = {"verbose": False} if "verbose" in inspect.signature(model.export).parameters else {}
    model.export(made, **quiet)
    partial = target + PARTIAL
    if tf.io.gfile.exists(partial):
        tf.io.gfile.rmtree(partial)
    for folder, _, files in os.walk(made):
        below = os.path.relpath(folder, made)
        place = partial if below == "." else posixpath.join(partial, below)
        tf.io.gfile.makedirs(place)
        for file in files:
            tf.io.gfile.copy(os.path.join(folder, file), posixpath.join(place, file))
    if tf.io.gfile.exists(target):
        tf.io.gfile.rmtree(target)
    tf.io.gfile.rename(partial, target)
