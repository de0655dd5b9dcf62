"""One file for each solver; each has ``solve(problem) -> TransportPlan``."""
