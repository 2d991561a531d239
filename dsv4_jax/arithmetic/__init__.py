"""What the ops' jnp definitions share: rounding, codecs, pages, and where things are."""
