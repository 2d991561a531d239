"""rotate."""
