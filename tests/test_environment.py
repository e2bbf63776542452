"""scripts/environment.sh, which the rounds and the tests' script source."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SCRIPT = SCRIPTS / "environment.sh"


def test_rounds_side_by_side_leave_each_other_the_package_s_record(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    call = f"set -e; . {SCRIPT}; PYTHON={sys.executable}; link_sources"
    for version in ("1.2.2", "1.2.3"):
        record = tmp_path / "build" / "namespace" / f"fp8_engine-{version}.dist-info"
        record.mkdir(parents=True)
        (record / "in-use").touch()
    rounds = [subprocess.Popen(["bash", "-c", call], cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(3)]
    assert [(round_.communicate()[1], round_.returncode) for round_ in rounds] == [(b"", 0)] * 3
    (held,) = record.parent.glob("*.dist-info")
    assert held == record, "another version's is gone"
    assert {file.name for file in held.iterdir()} == {"in-use", "METADATA"}
    assert (held / "METADATA").read_text().endswith("Version: 1.2.3\n")


@pytest.mark.parametrize("script", ["gpu.sh", "gpu_ranks.sh"])
def test_a_round_without_a_gpu_is_refused_before_it_makes_anything(script: str, tmp_path: Path) -> None:
    absent = tmp_path / "nvidia-smi"
    absent.write_text("#!/bin/sh\nexit 9\n")
    absent.chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    call = ["bash", str(SCRIPTS / script), str(tmp_path / "out")]
    found = subprocess.run(call, env=path, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert found.stderr == "error: nvidia-smi finds no GPU here; a round measures one\n"
    assert not any((tmp_path / "out").iterdir())
