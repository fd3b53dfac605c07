"""From events to records: who is who, what is inside every gradient, what to look at when."""
