"""Benchmarks of Monge against its peers, measured in the same run: ``python -m benchmarks.<name>``."""
