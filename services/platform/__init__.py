"""The platform: services of one machine, others as nodes, a newcomer's first command, and what it finds missing."""
