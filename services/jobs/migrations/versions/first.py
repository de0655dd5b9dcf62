"""Jobs, attempts, events, tokens and settings."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "jobs",
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("id", sa.String(200), nullable=False, unique=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("workers", sa.JSON(), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("idempotency_key", sa.String(128)),
        sa.Column("request_digest", sa.String(64), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("turn", sa.Double(), nullable=False),
        sa.Column("timeout", sa.Double()),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("submitted", sa.Double(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("since", sa.Double(), nullable=False),
        sa.Column("cancelled_by", sa.String(64)),
        sa.Column("first_started", sa.Double()),
        sa.Column("ended", sa.Double()),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("setbacks", sa.Integer(), nullable=False),
        sa.Column("not_before", sa.Double(), nullable=False),
        sa.Column("progress", sa.JSON()),
        sa.Column("run_id", sa.String(64)),
        sa.Column("experiment_id", sa.String(64)),
        sa.Column("model", sa.String(256)),
        sa.Column("tracked", sa.Text()),
        sa.UniqueConstraint("owner", "idempotency_key"),
    )
    op.create_index("jobs_by_state", "jobs", ["state", "turn"])
    op.create_index("jobs_by_owner", "jobs", ["owner"])
    op.create_table(
        "attempts",
        sa.Column("key", sa.Integer(), primary_key=True),
        sa.Column("job", sa.String(200), sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("workers", sa.Integer(), nullable=False),
        sa.Column("gpu", sa.Boolean(), nullable=False),
        sa.Column("started", sa.Double(), nullable=False),
        sa.Column("sent", sa.Boolean(), nullable=False),
        sa.Column("ended", sa.Double()),
        sa.Column("outcome", sa.String(16)),
        sa.Column("message", sa.Text()),
        sa.Column("stage", sa.Text()),
        sa.Column("error", sa.Text()),
        sa.Column("stopping", sa.Boolean(), nullable=False),
        sa.Column("trains", sa.Boolean(), nullable=False),
        sa.Column("first_images", sa.Integer()),
        sa.Column("first_at", sa.Double()),
        sa.Column("images", sa.Integer()),
        sa.Column("read", sa.Integer(), nullable=False),
        sa.UniqueConstraint("job", "number"),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("job", sa.String(200), sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16)),
    )
    op.create_index("events_of_job", "events", ["job", "id"])
    op.create_table(
        "tokens",
        sa.Column("key", sa.Integer(), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False, unique=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("requests_per_second", sa.Double(), nullable=False),
        sa.Column("max_jobs", sa.Integer(), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("revoked", sa.Double()),
    )
    op.create_table(
        "settings",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.Text(), nullable=False),
    )


def downgrade() -> None:
    """Drop the tables."""
    for table in ("settings", "tokens", "events", "attempts", "jobs"):
        op.drop_table(table)
