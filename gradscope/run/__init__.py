"""What was recorded of a training run, as plain data: nothing here knows torch."""
