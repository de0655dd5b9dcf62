"""The Ray Train run of a job, and what runs on each of its workers."""
