"""The line `optimizer.zero_grad()`: what is left in `.grad` from step to step."""
