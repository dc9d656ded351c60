"""docs/measured/methods-results.md is what its script makes of the results in the repository."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_that_of_the_results(tmp_path: Path) -> None:
    made = tmp_path / "page.md"
    script = ROOT / "studies" / "methods" / "methods_report.py"
    subprocess.run([sys.executable, str(script), "--out", str(made)], check=True)
    assert made.read_text() == (ROOT / "docs" / "measured" / "methods-results.md").read_text()
