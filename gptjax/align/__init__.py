"""Alignment: rewards, advantages and objectives as pure functions, each with its formula, source and fixed point."""
