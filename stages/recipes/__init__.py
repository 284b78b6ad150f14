"""What the engine can train, a package each: its feed, its objective, and how they are put together."""
