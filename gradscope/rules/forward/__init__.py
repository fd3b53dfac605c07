"""The line `logits, loss = model(xb, yb)`: the graph behind the loss."""
