"""Restart rules of commands that resume, for sweeps and launch/supervise.py. Imports the standard library alone."""

RESTART_ON = (75, 134, 137)  # interrupted with all saved; aborted, as by a lost peer; killed, as for its memory
MOST_IN_VAIN = 3  # ends in a row without progress before giving up


def exit_code(returncode: int) -> int:
    """The code of a process as a shell reports it: 128 + N where signal N ended it."""
    return returncode if returncode >= 0 else 128 - returncode


def pause_before(in_vain: int, pause: float, longest: float = 300.0) -> float:
    """Seconds before the next start after `in_vain` ends in a row without progress: `pause`, doubled by each."""
    return min(pause * 2 ** max(in_vain - 1, 0), longest)
