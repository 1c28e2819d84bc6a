"""python -m datasetdm_fast.export: see datasetdm_fast.export_cli."""

import sys

from datasetdm_fast.export_cli import EXAMPLES, main

__all__ = ["EXAMPLES", "main"]

if __name__ == "__main__":
    sys.exit(main())
