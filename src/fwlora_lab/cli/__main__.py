"""`python -m fwlora_lab.cli` is the command `fwlora`."""

import sys

from fwlora_lab.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
