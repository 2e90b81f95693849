"""Diagnostics: what a run would cost (plan), whether every mesh gives the same numbers (verify), what a machine can do (doctor)."""
