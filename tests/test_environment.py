"""scripts/environment.sh, which the rounds and the tests' script source."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "environment.sh"


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
