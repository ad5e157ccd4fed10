"""docs/phone.md: its commands, as they stand in the page, lead from a recipe to files that a phone loads."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_leads_to_a_phone(tmp_path):
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "phone.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for name in ("digits.py", "digits.yaml"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in blocks:
        done = subprocess.run(
            ["bash", "-e", "-c", block], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    places = sorted((tmp_path / "runs" / "digits" / "exports").iterdir())
    assert [place.name for place in places] == ["executorch-fp32", "litert-fp32", "litert-int8"]
    found = {place.name: json.loads((place / "verify.json").read_text()) for place in places}
    assert all(said["passed"] and said["examples"] == 500 for said in found.values())
    for kind in ("litert", "executorch"):
        assert found[f"{kind}-fp32"]["largest_difference"] < 1e-4
    assert found["litert-int8"]["bytes"] < found["litert-fp32"]["bytes"]
    assert "scale" in found["litert-int8"]["inputs"][0]["int8"]
