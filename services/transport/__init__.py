"""Optimal-transport service: plans for many clients, and global plans for all ranks of a job."""
