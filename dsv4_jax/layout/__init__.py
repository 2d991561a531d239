"""How a cache is laid out: storage formats, schemas, plans."""
