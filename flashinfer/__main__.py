"""`python -m flashinfer`: the command line."""

import sys

from flashinfer._entry import main

sys.exit(main())
