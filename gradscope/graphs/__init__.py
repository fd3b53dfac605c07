"""The autograd graph as plain arrays: to draw, and to look things up in."""
