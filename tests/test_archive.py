from __future__ import annotations

import importlib
import io
import pickle
import subprocess
import sys
import traceback
import zipfile
from pathlib import Path

import cloudpickle
import pytest

from tfos_magic import archive


def in_a_process_without_the_package(tmp_path: Path, code: str, data: bytes) -> str:
    """Run `code` with the base interpreter: it has cloudpickle on its path and nothing else of ours."""
    (tmp_path / "f.pkl").write_bytes(data)
    boot = f"import sys; sys.path[:0] = [{str(Path(cloudpickle.__file__).parents[1])!r}]\n"
    hide = "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    run = f"import pickle; f = pickle.load(open({str(tmp_path / 'f.pkl')!r}, 'rb'))\n"
    done = subprocess.run(
        [sys.executable, "-S", "-c", boot + hide + run + code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_zip_holds_the_package_and_its_companions_compiled() -> None:
    names = set(zipfile.ZipFile(io.BytesIO(archive.build())).namelist())
    assert {"tfos_magic/__init__.py", "tfos_magic/node/child.pyc", "cloudpickle/cloudpickle.py", "pynvml.py"} <= names
    assert len(archive.build()) < 1_000_000  # travels inside each task of the launch job


def test_what_only_a_notebook_needs_stays_at_home() -> None:
    from test_imports import LAYERS

    names = set(zipfile.ZipFile(io.BytesIO(archive.build())).namelist())
    paths = {module: module.replace(".", "/") for module in LAYERS}
    there = {module for module, path in paths.items() if {f"{path}.py", f"{path}/__init__.py"} & names}
    stays = {module for module in LAYERS if module.startswith("tfos_magic.doctor")}
    assert there == {module for module, layer in LAYERS.items() if layer != "notebook"} - stays


def test_an_entry_runs_where_the_package_is_not_installed_and_leaves_nothing(tmp_path: Path) -> None:
    function = archive.by_value("tfos_magic.roles:_testing_entry", archive.build())
    data = cloudpickle.dumps(function)
    assert b"tfos_magic.archive" not in data
    code = """
import os
before = set(os.listdir('/proc/self/fd'))
try:
    next(iter(f()))
except AttributeError as error:
    print('reached', error)
print(sorted(name for name in sys.modules if 'tfos' in name), [p for p in sys.path if 'proc' in p])
print(set(os.listdir('/proc/self/fd')) - before)
"""
    out = in_a_process_without_the_package(tmp_path, code, data).splitlines()
    assert out[0].startswith("reached module 'tfos_magic.roles' has no attribute '_testing_entry'")
    assert out[1] == "[] []"
    assert out[2] == "set()"


def test_a_version_that_is_installed_there_is_neither_used_nor_lost() -> None:
    import tfos_magic.roles

    entry = archive.by_value("tfos_magic.node.channel:read_all", archive.build())
    function = pickle.loads(cloudpickle.dumps(entry))
    with pytest.raises(TypeError) as caught:  # it takes a descriptor and is given the zip: raised by the shipped copy
        list(function())
    files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert files[-1] == "tfos_magic/node/channel.py"
    assert sys.modules["tfos_magic.roles"] is tfos_magic.roles


def test_a_worker_that_spark_reuses_finds_the_package_every_time() -> None:
    for _ in range(3):
        with pytest.raises(TypeError):  # reached, as above
            list(archive.by_value("tfos_magic.node.channel:read_all", archive.build())())
        importlib.invalidate_caches()  # as PySpark's worker does between tasks, and sc.addPyFile
    assert not [place for place in sys.path_importer_cache if place.startswith("/proc/self/fd/")]
