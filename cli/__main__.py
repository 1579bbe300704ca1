"""`python -m cli`: the program `grid`."""

import sys

from cli.main import main

sys.exit(main())
