"""Settings of the documentation site. `python docs/_site/build.py SITE` builds it; CONTRIBUTING.md says more.

The pages are the Markdown files of this folder, as they are read in the repository, and the reference of the Python
functions in `api/`, whose text is taken from the docstrings, and the notebooks with their outputs.
"""

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_site"), str(HERE.parent)]

project = "patchsae"
author = "The patchsae developers"
project_copyright = author
release = version = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton", "docstrings", "pages", "notebooks"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext", ".txt": "markdown", ".ipynb": "markdown"}
exclude_patterns = ["_site"]
highlight_language = "none"
smartquotes = False  # quotes are as they were written

myst_heading_anchors = 4  # links such as format.md#result-files, with the names that GitHub gives to headings

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # `ModelOptions()`, and not all of its fields
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 110  # of names with their modules, which are not shown
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_site/static"]
templates_path = ["_site/templates"]
html_css_files = ["style.css"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/versions.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
html_copy_source = False
html_show_sourcelink = False
html_use_index = True
html_last_updated_fmt = None
copybutton_prompt_text = "$ "
