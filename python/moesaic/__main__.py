"""``python -m moesaic`` is the command ``moesaic``."""

import sys

from .cli import main

sys.exit(main())
