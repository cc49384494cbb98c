"""`python -m tools.scaling`: rewrites the predictions of docs/scaling.md."""

from tools.scaling.page import PAGE, page

if __name__ == "__main__":
    PAGE.write_text(page())
