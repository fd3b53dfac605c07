"""Two runs of what should be the same training: where they part, and in what."""
