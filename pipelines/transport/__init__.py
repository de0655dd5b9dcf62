"""Optimal transport: cost, problem, plan, solvers, and the interface by which an objective asks for a plan."""
