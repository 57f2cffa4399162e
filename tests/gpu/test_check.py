"""The script for a GPU, tried where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).with_name("check.py")


@pytest.mark.slow
def test_a_dry_run_measures_all_of_it(tmp_path, clean_env):
    ended = subprocess.run(
        [sys.executable, CHECK, "--dry-run", "--output", tmp_path],
        env=clean_env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )

    found = json.loads((tmp_path / "check.json").read_text())
    assert (ended.returncode, found["failed"]) == (0, {}), ended.stderr
    assert found["complete"]
    assert list(found["seconds_by_section"]) == ["bandwidth", "kernels", "steps", "exact", "trained", "quantized"]
    rows = {(row["section"], row["what"]): row for row in found["rows"]}
    assert rows["bandwidth", "copy"]["gigabytes_per_second"] > 0
    for slots in (1, 8, 16, 32, 36, 64):
        assert rows["steps", f"tiny, graph, invariant, {slots} slots"]["ms"] > 0
    # float32 on a CPU, where the text is the same whatever the block
    assert rows["exact", "tiny, tree: identical to AR"]["answers"] == "2/2"
    assert rows["trained", "nano, verify-lossless, adaptive drafts, 9 slots, ar"]["identical"] == "2/2"
    assert len((tmp_path / "check.txt").read_text().splitlines()) == len(found["rows"])
