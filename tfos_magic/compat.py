"""TensorFlowOnSpark's ``compat``: three helpers that hid how TensorFlow's versions differ.

Runs on: executor, in the child.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf

_ONE_FILE = (".keras", ".h5", ".hdf5")


def export_saved_model(model: Any, export_dir: str, is_chief: bool = False) -> None:
    """Write a Keras model on the chief; other nodes write nothing.

    Parameters
    ----------
    model : keras.Model
        Built, with known input shapes.
    export_dir : str
        A directory for a SavedModel; a name that ends in ``.keras`` (or ``.h5``) for a file of Keras' own.
    is_chief : bool
        ``ctx.is_chief``.
    """
    if not is_chief:
        return
    if PurePosixPath(export_dir).suffix in _ONE_FILE:
        model.save(export_dir)
    elif hasattr(model, "export"):
        model.export(export_dir)
    else:  # a subclass of tf.Module, or Keras before 2.13
        import tensorflow as tf

        tf.saved_model.save(model, export_dir)


def disable_auto_shard(options: tf.data.Options) -> None:
    """Tell TensorFlow's strategies not to split a dataset that is this node's share already."""
    import tensorflow as tf

    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF


def is_gpu_available() -> bool:
    """Return whether TensorFlow sees a GPU on this node."""
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))
