"""The host half: which request has which slot, blocks and length."""
