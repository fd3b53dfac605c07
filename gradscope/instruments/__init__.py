"""From tensors to numbers: one thing to measure a file.

Instruments are handed tensors at the moment they are to be measured and keep none of them, beyond
buffers of their own that are allocated once. Values that lie on an accelerator are copied to the
host without waiting, and read when they have arrived.
"""
