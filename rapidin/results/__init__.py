"""Results: hits and what is known of each, and how they are shown: terminal, JSON, HTML page, notebook."""
