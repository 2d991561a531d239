"""The site: Sphinx reads the pages where they are, in this folder and at the root. scripts/docs.sh builds it."""

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the extensions that are here

project = "dsv4_jax"
copyright = "the authors of dsv4_jax, Apache-2.0"
release = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["version"]

# The source folder is the root of the repository, so that every link is the same here and on the forge.
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "benchmarks/README.md"]
exclude_patterns = ["build", "dist", "dsv4_jax", "ffi", "scripts", "tests", ".*"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "commands", "docstrings", "links", "tables"]
myst_heading_anchors = 4
highlight_language = "none"  # of blocks that name none

html_theme = "furo"
html_title = f"dsv4_jax {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
templates_path = ["templates"]
html_additional_pages = {"index": "to_docs.html"}
html_copy_source = False
html_show_sphinx = False

# Docstrings are Google's style; types stand in the signatures, shapes in the text.
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# Every name that the reference uses is explained in it. Those of others are no links, since a build asks no network;
# nor are names of unions, which Sphinx does not take for types.
nitpicky = True
nitpick_ignore = [("py:class", name) for name in ("Matrix", "NDArray", "Role")]
OTHERS = "jax|jaxlib|jaxtyping|numpy|np|collections|os|pathlib|contextlib|types|typing|enum"
nitpick_ignore_regex = [("py:.*", rf"({OTHERS})\..*")]
