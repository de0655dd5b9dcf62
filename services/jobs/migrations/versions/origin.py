"""Which job each one continues."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Jobs that are there already continue none."""
    op.add_column("jobs", sa.Column("origin", sa.String(224)))


def downgrade() -> None:
    """Undo that."""
    op.drop_column("jobs", "origin")
