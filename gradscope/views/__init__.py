"""What a person or a program is shown of a run: one view a file, over plain data."""
