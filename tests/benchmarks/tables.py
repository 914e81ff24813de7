"""What the benchmarks share: medians, a table, the machine it ran on."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """Return ``min-max``."""
    return f"{min(values):,.3g}-{max(values):,.3g}"


def local_spark(slots: int, **settings: str) -> Any:
    """Return a quiet local session; `settings` are Spark's, with ``_`` for ``.``, e.g. ``spark_driver_memory="6g"``."""
    from pyspark.sql import SparkSession

    quiet = {"spark_ui_enabled": "false", "spark_ui_showConsoleProgress": "false", "spark_driver_host": "127.0.0.1"}
    builder = SparkSession.builder.master(f"local[{slots}]")
    for name, value in {**quiet, **settings}.items():
        builder = builder.config(name.replace("_", "."), value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print rows, the first being the header, as Markdown."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"\n### {title}\n")
    for index, row in enumerate(rows):
        print("| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |")
        if index == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    sys.stdout.flush()


def print_machine() -> None:
    """Print what the figures depend on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("pyspark", "tensorflow", "keras", "pyarrow"))
    print(f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB; Python {platform.python_version()}, {packages}.")
