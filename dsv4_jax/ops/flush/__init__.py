"""flush."""
