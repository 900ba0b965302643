"""`python -m tl_melbo` does what `tl-melbo` does."""

from tl_melbo.cli import app

if __name__ == "__main__":
    app()
