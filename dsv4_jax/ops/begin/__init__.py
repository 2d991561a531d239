"""begin_step."""
