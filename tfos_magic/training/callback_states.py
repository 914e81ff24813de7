"""What callbacks remember between epochs, out of them and back.

Runs on: executors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import keras

from tfos_magic.errors import UsageError
from tfos_magic.training.checkpoint_files import Array, array_of

# What Keras's callbacks remember between epochs, 3.3 to 3.15; what they are configured with is the cell's business.
_REMEMBERED = {
    "EarlyStopping": ("wait", "stopped_epoch", "best", "best_epoch", "best_weights"),
    "ReduceLROnPlateau": ("wait", "best", "cooldown_counter"),
    "ModelCheckpoint": ("best", "epochs_since_last_save", "_batches_seen_since_last_saving", "_last_batch_seen"),
    "SwapEMAWeights": ("_ema_weights_in_model",),  # from 3.7 on
}


def _remembered_by(callback: Any) -> tuple[str, ...]:
    kinds = [(getattr(keras.callbacks, name, None), names) for name, names in _REMEMBERED.items()]
    return next((names for kind, names in kinds if kind is not None and isinstance(callback, kind)), ())


def _labelled(callbacks: Sequence[Any]) -> list[tuple[str, Any]]:
    """Return each callback under a name that it has on every node and in every run: its class, and which of these."""
    seen: dict[str, int] = {}
    found = []
    for callback in callbacks:
        kind = type(callback).__name__
        seen[kind] = seen.get(kind, 0) + 1
        found.append((f"{kind}-{seen[kind]}", callback))
    return found


def states_of(callbacks: Sequence[Any], arrays: dict[str, Array]) -> dict[str, Any]:
    """Return what callbacks remember, as JSON can say it; weights go to `arrays`.

    Raises
    ------
    UsageError
        A ``state_dict()`` has something that JSON cannot say.
    """
    states: dict[str, Any] = {}
    for label, callback in _labelled(callbacks):
        state: dict[str, Any] = {}
        for name in _remembered_by(callback):
            value = getattr(callback, name, None)
            if isinstance(value, list):
                arrays |= {f"callback-{label}-{name}-{i:04}": array_of(each) for i, each in enumerate(value)}
                state[name] = {"arrays": len(value)}
            elif hasattr(callback, name):
                state[name] = value if value is None or isinstance(value, bool | int) else float(value)
        if callable(getattr(callback, "state_dict", None)):
            state["state_dict"] = _own_state(callback)
        if state:
            states[label] = state
    return states


def _own_state(callback: Any) -> Any:
    """Return a copy of what a callback of the user's own says."""
    try:
        return json.loads(json.dumps(callback.state_dict()))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"What {type(callback).__name__}.state_dict() returns cannot be saved: {error}.",
            hint="Return numbers, strings, lists and dicts; float(…) and .tolist() make them of NumPy's.",
        ) from error


def restore_states(callbacks: Sequence[Any], states: dict[str, Any], arrays: dict[str, Array]) -> None:
    """Give callbacks back what :func:`states_of` has found in them."""
    for label, callback in _labelled(callbacks):
        state = dict(states.get(label, {}))
        own = state.pop("state_dict", None)
        if state.get("best") is not None and getattr(callback, "monitor_op", True) is None:
            # Put off by Keras until the first epoch's end, where older ones (up to 3.7) would also forget the best.
            callback._set_monitor_op()
        for name, value in state.items():
            if isinstance(value, dict):
                value = [arrays[f"callback-{label}-{name}-{i:04}"] for i in range(value["arrays"])]
            setattr(callback, name, value)
        if own is not None and callable(getattr(callback, "load_state_dict", None)):
            callback.load_state_dict(own)
