"""The training job: its driver, and what runs on each of its workers."""
