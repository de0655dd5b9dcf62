"""Local platform: start, stop and check services; join nodes; ``monge doctor`` and ``monge demo``."""
