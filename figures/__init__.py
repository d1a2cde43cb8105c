"""The figures of the book, drawn by `python -m figures`; their SVG and JSON are committed here."""
