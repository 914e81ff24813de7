"""What each node is told when all have met: its role, its environment, what it will be fed.

Runs on: driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tfos_magic import roles
from tfos_magic.members import Member
from tfos_magic.options import RunOptions

_DATA_OPTIONS = ("batch_size", "epochs", "features", "label", "weight", "shuffle")


class Briefing:
    """The start messages of one run.

    Parameters
    ----------
    options : RunOptions
    nodes : sequence of Member
        All of them, in node order.
    feeds, queues : sequence of str
        Names of the cached feeds and of the queues.
    """

    def __init__(
        self, options: RunOptions, nodes: Sequence[Member], feeds: Sequence[str], queues: Sequence[str]
    ) -> None:
        self._options = options
        self._nodes = nodes
        self._feeds = tuple(feeds)
        self._queues = tuple(queues)

    def is_server(self, role: roles.Role) -> bool:
        """Return True for a node that only serves variables or computations to the chief."""
        return bool(self._options.num_ps) and not self._options.serves_itself and role.job_name in ("ps", "worker")

    @property
    def fed_nodes(self) -> list[Member]:
        """The nodes over which rows are dealt."""
        return [node for node in self._nodes if node.role.is_training and not self.is_server(node.role)]

    def send_all(self) -> None:
        """Let all nodes begin; they must have met."""
        if self._options.is_independent:
            for node in self._nodes:
                self.send_alone(node)
            return
        spec = roles.cluster_spec([node.role for node in self._nodes], [node.address for node in self._nodes])
        counts = Counter(node.host for node in self._nodes)
        for node in self._nodes:  # node 0 first: it leads the others, who wait a second if it is late
            environment = {"TF_CONFIG": roles.tf_config(node.role, spec), "TF_GRPC_REUSE_PORT": "true"}
            is_coordinator = node.index == 0 and any(self.is_server(other.role) for other in self._nodes)
            fields = {"is_coordinator": is_coordinator, "nodes_on_host": counts[node.host]}
            self._send(node, spec, environment, is_chief=node.index == 0, **fields)

    def send_alone(self, node: Member) -> None:
        """Let a node begin as the whole of a cluster."""
        spec = roles.cluster_spec([node.role], [node.address])
        # Which others will share its host is not known yet, and its results should not depend on that.
        self._send(node, spec, {}, task_index=0, is_chief=True, is_coordinator=False, nodes_on_host=1)

    def _send(self, node: Member, spec: dict[str, list[str]], environment: dict[str, str], **fields: Any) -> None:
        options, fed = self._options, self.fed_nodes
        message = {
            "type": "start",
            "job_name": node.role.job_name,
            "task_index": node.role.task_index,
            "cluster_spec": spec,
            "num_workers": sum(other.role.is_training for other in self._nodes),
            "is_server": self.is_server(node.role),
            "environment": environment,
            "release_port": options.release_port,
            "tensorboard": options.tensorboard if node.index == 0 else None,
            "predicts": options.predicts,
            "feeds": self._feeds,
            "queues": self._queues,
            "feed_index": fed.index(node) if node in fed else 0,
            "seed": options.seed,
            "training": options.training.to_json(),
            "data_options": {**{name: getattr(options, name) for name in _DATA_OPTIONS}, "seed": options.data_seed},
        }
        node.send({**message, **fields})
