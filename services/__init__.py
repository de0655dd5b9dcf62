"""Processes of Monge: the job service, training, the transport service, the endpoint, and the platform."""
