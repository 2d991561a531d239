"""The gathers."""
