"""The command line, as `gptjax` and as `python -m gptjax`."""

import os
import sys
import threading
from typing import NoReturn

from gptjax.cli import main
from gptjax.runtime.process import BACKGROUND


def console() -> NoReturn:
    """Runs a verb and ends the process, at once where the verb failed while a step was being compiled."""
    code = main()
    if code and any(thread.name.startswith(BACKGROUND) for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(code)  # Python would wait for what nobody needs
    sys.exit(code)


if __name__ == "__main__":
    console()
