"""append_window and append_tail."""
