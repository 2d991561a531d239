"""A DeepSeek-V4 attention stack that uses the cache: the code to copy from when a model of your own is to use it.

``weights.py`` holds the parameters, ``layer.py`` the projections of one layer, ``attention.py`` sink attention and the
indexer's scores, ``stack.py`` one step of the cached model, ``serve.py`` several requests over time, ``text.py`` the
text they read, ``full_context.py`` the same model without a cache and ``verify.py`` the comparison of the two. Only the
public interface of ``dsv4_jax`` is used.
"""
