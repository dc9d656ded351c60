"""Hits as one HTML page, for a file or a notebook: it asks no other host for anything and needs no script.

`text` makes markup of texts that nobody vouches for, `drawings` the small pictures, `shades` the steps in
which tokens are shaded and the numbers that the script works with, `parts` a query's markup, `document` all.
"""

from rapidin.results.html.document import notebook, page

__all__ = ["notebook", "page"]
