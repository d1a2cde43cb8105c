"""The book: each `ch*.py` is a chapter, a module and a test file at once."""
