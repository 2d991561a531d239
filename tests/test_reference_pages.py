"""The reference has every public name, and each once."""

import re
from pathlib import Path

import dsv4_jax
from dsv4_jax import ops

REFERENCE = Path(__file__).parents[1] / "docs/reference"


def test_every_public_name_has_its_place():
    text = "".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
    named = re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)$", text, re.MULTILINE)
    assert len(named) == len(set(named))
    public = {f"dsv4_jax.{name}" for name in dsv4_jax.__all__} - {"dsv4_jax.ops"}
    # OperandError is dsv4_jax's as well.
    public |= {f"dsv4_jax.ops.{name}" for name in ops.__all__} - {"dsv4_jax.ops.OperandError"}
    assert public <= set(named), sorted(public - set(named))
