"""Sweeps: a grid of runs through Ray Tune."""
