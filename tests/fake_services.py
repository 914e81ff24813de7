"""What stands behind the magics, without Spark and without a board."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tfos_magic import cluster, doctor
from tfos_magic.namedtuple_session import ProcessStatus, SessionStatus
from tfos_magic.widgets import diagnosis, namedtuple_table, publish


class FakeInference:
    """Stands until it is closed; what `failing` holds goes wrong when it is done."""

    def __init__(self, call: SimpleNamespace, failing: dict[str, BaseException]) -> None:
        self.call = call
        self.frame = SimpleNamespace(of=call.payload)
        self.is_open = True
        self.nodes = [SimpleNamespace(name="worker:0")]
        self.failing = failing
        if "load" in failing:
            self.is_open = False
            raise failing["load"]

    def save(self, path: str, mode: str) -> str:
        self.call.saved = (path, mode)
        self.is_open = False
        if "save" in self.failing:
            raise self.failing["save"]
        return f"frame of {path}"

    def close(self) -> None:
        self.is_open = False
        if "close" in self.failing:
            raise self.failing["close"]


@dataclass
class FakeServices:
    """Everything beyond shipping: no Spark, no board."""

    calls: list[SimpleNamespace] = field(default_factory=list)
    boards: list[tuple[Any, bool]] = field(default_factory=list)
    inferences: list[FakeInference] = field(default_factory=list)
    failing: dict[str, BaseException] = field(default_factory=dict)
    is_lasting: bool = False
    said: list[str] = field(default_factory=list)
    found: Any = "a session"
    outcome: Any = "the result"
    cluster: Any = None
    inference: Any = None
    session: Any = None
    widgets: Any = None
    doctor: Any = None
    namedtuple_patch: Any = None
    namedtuple_jobs: Any = None
    namedtuple_session: Any = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    touched: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cluster = SimpleNamespace(
            RunOptions=cluster.RunOptions,
            modules_to_preload=cluster.modules_to_preload,
            run=self._run,
            plan=lambda spark, options: ["the plan"],
        )
        self.inference = SimpleNamespace(Inference=self._infer)
        self.session = SimpleNamespace(find_session=lambda namespace, name=None: self.found, local_session=self._local)
        self.widgets = SimpleNamespace(
            LiveBoard=self._board, diagnosis=diagnosis, namedtuple_table=namedtuple_table, publish=publish
        )
        self.doctor = doctor
        self.namedtuple_patch = SimpleNamespace(**{name: self._patch(name) for name in ("status", "revert", "restore")})
        self.namedtuple_jobs = SimpleNamespace(CleanJobs=self._clean_jobs)
        self.namedtuple_session = SimpleNamespace(
            restore_workers=lambda contexts: self.said.append("restore workers") or [],
            **{name: self._ask(name) for name in ("survey", "revert", "restore")},
        )

    def _run(self, spark: Any, payload: Any, options: Any, **more: Any) -> Any:
        self.calls.append(SimpleNamespace(spark=spark, payload=payload, options=options, **more))
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def _infer(self, spark: Any, payload: Any, options: Any, frame: Any, **more: Any) -> FakeInference:
        call = SimpleNamespace(spark=spark, payload=payload, options=options, frame=frame, **more)
        call.open_before = [each.call.options.title for each in self.inferences if each.is_open]
        self.calls.append(call)
        self.inferences.append(FakeInference(call, dict(self.failing)))
        return self.inferences[-1]

    def _local(self, slots: int) -> str:
        return f"local[{slots}]"

    def _board(self, board: Any, shell: Any, *, quiet: bool = False, lasting: bool = False) -> Any:
        self.boards.append((board, quiet))
        self.is_lasting = lasting
        return contextlib.nullcontext()

    def _clean_jobs(self) -> SimpleNamespace:
        return SimpleNamespace(
            start=lambda: self.said.append("jobs clean"),
            close=lambda: self.said.append("jobs as they are"),
            touched=lambda: self.touched,
        )

    def _ask(self, name: str) -> Any:
        def act(spark: Any = None, **options: Any) -> SessionStatus:
            self.said.append(f"{name} of {spark}")
            self.asked.append(options)
            patch = {
                "is_patched": False,
                "mended_count": 0,
                "reverted_at": None,
                "is_prevented": True,
                "cause": "<why>",
            }
            patch |= {"class_count": 0, "downgraded": (), "rescued": (), "owners": {}}
            return SessionStatus(ProcessStatus("driver", "driver", "host", 1, patch, 1.0, "then"), spark=str(spark))

        return act

    def _patch(self, name: str) -> Any:
        def act() -> SimpleNamespace:
            self.said.append(name)
            return SimpleNamespace(summary=f"namedtuple patch: {name}")

        return act
