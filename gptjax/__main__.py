"""The command line as `python -m gptjax`."""

import sys

from gptjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
