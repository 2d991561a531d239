"""save_displaced."""
