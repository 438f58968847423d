"""`python -m bridge`: the same as the `weighbridge` command."""

import sys

from bridge.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
