"""What stands between the rows of a feed: TensorFlowOnSpark's markers.

Runs on: anywhere.
"""

from __future__ import annotations


class Marker:
    """Base of what is in a queue and is no row."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class EndPartition(Marker):
    """All rows of a Spark partition have come."""
