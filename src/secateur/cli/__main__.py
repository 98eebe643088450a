"""`python -m secateur.cli`, as launchers of several processes start it."""

import sys

from secateur.cli import main

sys.exit(main())
