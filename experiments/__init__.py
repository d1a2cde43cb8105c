"""The long runs behind the book's figures and tables; `python -m experiments list` names them."""
