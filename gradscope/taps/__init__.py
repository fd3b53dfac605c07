"""The seams of torch at which a training loop can be seen, one seam a file.

A tap is installed in the process with its first listener and removed with its last. It knows no
parameter and no run: it says what happened, to whoever listens, and never lets an error of a
listener into the program.
"""
