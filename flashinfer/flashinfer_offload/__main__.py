"""`python -m flashinfer_offload`: the command line, whoever owns `flashinfer/__init__.py`."""

import sys

from flashinfer_offload import main

sys.exit(main())
