"""Networks: those that discriminate, those that generate, and how they are built, saved and called."""
