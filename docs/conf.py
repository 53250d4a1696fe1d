"""The documentation as a site: pip install '.[docs]', then sphinx-build -W docs site."""

import trace_jax

project, author, version = "trace_jax", "The trace_jax authors", trace_jax.__version__
copyright = author
repository = "https://github.com/trace-jax/trace_jax"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "sphinx_book_theme"
html_title = "trace_jax"
html_theme_options = {
    "repository_url": repository,
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
}
myst_heading_anchors = 3  # as GitHub has them
myst_url_schemes = {"http": None, "https": None}
default_role = "code"  # of docstrings
autodoc_mock_imports = ["lm_eval"]  # of the extra "eval"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures in docstrings' words: shapes and units
