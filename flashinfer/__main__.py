"""`python -m flashinfer`: the command line."""

import sys

from flashinfer_offload import main

sys.exit(main())
