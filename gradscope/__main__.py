"""``python -m gradscope`` is the ``gradscope`` command."""

from __future__ import annotations

import sys

from gradscope.cli import main

if __name__ == "__main__":
    sys.exit(main())
