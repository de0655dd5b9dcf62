"""Jobs: submitted, followed, cancelled; and what one does on the cluster."""
