"""Results as one HTML page, for a file or a notebook, that loads nothing and can be read without its script.

`text` makes markup of untrusted texts, `drawings` makes the histograms and bars, `shades` maps contributions
to the shades of tokens and encodes numbers for the script. `view` decides what the page shows of a query,
`query` and `hits` are its markup, and `document` is the whole page with `page.css` and `page.js`.
"""

from rapidin.results.html.document import Live, document, notebook, page, page_style

__all__ = ["Live", "document", "notebook", "page", "page_style"]
