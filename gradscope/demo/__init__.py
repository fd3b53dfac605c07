"""A small GPT, its text and two training loops: a user's program that ships with the package."""
