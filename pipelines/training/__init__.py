"""The loop, what it carries from step to step, and how that is saved."""
