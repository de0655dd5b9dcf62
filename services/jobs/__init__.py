"""Job service: submission, scheduling, logs, and the driver of a job."""
