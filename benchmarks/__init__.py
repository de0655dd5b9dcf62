"""Tables of Monge beside its peers, all measured in the same run: ``python -m benchmarks.<name>``."""
