"""DeepSeek-V4, whole, on this package's cache: plain functions over a pytree of weights.

``config.py`` is what a model is, ``weights.py`` the pytree, ``layers.py`` what every part uses, ``attention.py``,
``mixture.py`` and ``hyper_connections.py`` the parts, ``model.py`` one step of the whole; ``checkpoint.py`` loads a
folder, ``random_checkpoint.py`` makes a small one, ``tokens.py`` and ``text.py`` turn text into requests, ``serve.py``
serves several over time, ``full_context.py`` is the same model without a cache and ``verify.py`` compares the two.

Only the public interface of ``dsv4_jax`` is used: this is the code to copy from when a model of your own is to use the
cache.
"""
