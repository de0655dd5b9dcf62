"""Indices for frequent queries."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

# Without `batch_alter_table`: SQLite would copy the table, and cannot drop one that others refer to.


def upgrade() -> None:
    """Flag jobs whose state must be marked in MLflow, instead of comparing each row with what was last marked."""
    op.add_column("jobs", sa.Column("untracked", sa.Boolean(), nullable=False, server_default=sa.true()))
    told = sa.text("UPDATE jobs SET untracked = :no WHERE tracked = state || ': ' || reason")
    op.execute(told.bindparams(sa.bindparam("no", False, type_=sa.Boolean)))
    op.drop_column("jobs", "tracked")
    op.drop_index("jobs_by_owner", "jobs")
    op.create_index("jobs_by_owner", "jobs", ["owner", "state"])
    op.create_index("jobs_untracked", "jobs", ["untracked"])


def downgrade() -> None:
    """Drop the flag; the states of all jobs are marked again."""
    op.drop_index("jobs_untracked", "jobs")
    op.drop_index("jobs_by_owner", "jobs")
    op.create_index("jobs_by_owner", "jobs", ["owner"])
    op.add_column("jobs", sa.Column("tracked", sa.Text()))
    op.drop_column("jobs", "untracked")
