"""When a merge happens, how much it may cost, and what it does."""
