"""Rewards that a program can check, as functions for rewards.sources."""


def closes_sentences(answer: str) -> float:
    """The share of an answer's lines that end a sentence; 0 where it has no whole line, or one stands twice in it.

    A line is whole where another follows it: of the last one nobody knows the end.
    """
    lines = [line.strip() for line in answer.split("\n")[:-1] if line.strip()]
    if not lines or len(set(lines)) < len(lines):
        return 0.0
    return sum(line.rstrip("\"')]").endswith((".", "!", "?")) for line in lines) / len(lines)
