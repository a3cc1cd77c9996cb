"""The benchmarks are no package of the distribution: their tests find them in the repository."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
