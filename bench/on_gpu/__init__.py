"""What `bench/gpu.py` measures on a GPU, one module a subject; each lists its cases and runs none by itself.

The page `docs/measured/performance.md` is made from the same lists, so it names what was not measured, too.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "studies" / "common"))  # random_cache
