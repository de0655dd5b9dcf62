"""Origin of a job that continues another one."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column; existing jobs have no origin."""
    op.add_column("jobs", sa.Column("origin", sa.String(224)))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("jobs", "origin")
