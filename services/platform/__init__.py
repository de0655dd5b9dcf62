"""The platform of one machine: its services, what a newcomer's first command runs, and what it finds missing."""
