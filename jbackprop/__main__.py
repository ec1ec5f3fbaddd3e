"""python -m jbackprop."""

import sys

from jbackprop.cli import main

sys.exit(main())
