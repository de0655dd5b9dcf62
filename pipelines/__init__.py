"""What a job computes: data, networks, transport plans, objectives and the training loop.

Nothing here knows of Ray, MLflow, S3 or HTTP: everything runs in one process, under ``torch.distributed``, or
on a bare GPU machine.
"""
