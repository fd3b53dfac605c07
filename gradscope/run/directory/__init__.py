"""The run directory: what was recorded, in files that outlive the process and any engine reads.

``layout.py`` says what lies where; ``parts.py`` turns rows into Parquet and back; ``people.py`` and
``tensors.py`` do the same for parameters and for kept tensors; ``writer.py`` writes while the
program trains; ``stored.py`` reads.
"""
