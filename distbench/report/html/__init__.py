"""Results as pages of HTML with pictures: one file, no script, nothing fetched (docs/outputs.md).

Geometry is computed here, drawn by the templates as SVG. Loaded in the parent, where a page is asked for.
"""
