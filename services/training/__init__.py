"""Training of a job on Ray Train: the driver's side and the workers' side."""
