"""The report of a comparison: comparison.json -> one HTML page that needs nothing else, and Markdown."""
