"""Indices for the questions that are asked most."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

# Without `batch_alter_table`: SQLite would copy the table, and refuse to drop one that others refer to.


def upgrade() -> None:
    """Mark the jobs of which MLflow is to be told, in place of comparing each row with what MLflow was told."""
    op.add_column("jobs", sa.Column("untracked", sa.Boolean(), nullable=False, server_default=sa.true()))
    told = sa.text("UPDATE jobs SET untracked = :no WHERE tracked = state || ': ' || reason")
    op.execute(told.bindparams(sa.bindparam("no", False, type_=sa.Boolean)))
    op.drop_column("jobs", "tracked")
    op.drop_index("jobs_by_owner", "jobs")
    op.create_index("jobs_by_owner", "jobs", ["owner", "state"])
    op.create_index("jobs_untracked", "jobs", ["untracked"])


def downgrade() -> None:
    """Undo that; MLflow is told of all jobs again."""
    op.drop_index("jobs_untracked", "jobs")
    op.drop_index("jobs_by_owner", "jobs")
    op.create_index("jobs_by_owner", "jobs", ["owner"])
    op.add_column("jobs", sa.Column("tracked", sa.Text()))
    op.drop_column("jobs", "untracked")
