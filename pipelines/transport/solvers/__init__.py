"""Solvers, one module each; most define ``solve(problem) -> TransportPlan``."""
