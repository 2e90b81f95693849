"""Diagnostics: the cost of a run (plan), the same numbers on every mesh (verify), the state of a machine (doctor)."""
