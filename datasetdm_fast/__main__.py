"""`python -m datasetdm_fast` is the script `datasetdm-fast`."""

import sys

from datasetdm_fast.cli import main

sys.exit(main())
