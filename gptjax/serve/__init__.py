"""Models that are talked to: conversations, and the terminal that holds one."""
