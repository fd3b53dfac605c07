"""Other programs' plug-ins; each imports its framework only inside."""
