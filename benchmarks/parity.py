"""Parity of every layout with one process, written to docs/parity.md (float32: docs/parity_float32.md).

    python benchmarks/parity.py [--dtype float32] [--models qwen3-vl ...] [--only "TP 2" ...] [--missing] [--output FILE]

Without options every cell is measured anew; with them the cells are merged into the table. The matrix and its
comparison are the tests' own: tests/parallel/parity.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.parallel.parity import main

if __name__ == "__main__":
    raise SystemExit(main())
