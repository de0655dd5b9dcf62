"""Processes: what runs, where, and how the parts talk to each other."""
