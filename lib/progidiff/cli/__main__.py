"""``python -m progidiff.cli``: the command line without its script, for launchers that start modules."""

from progidiff.cli.main import app

if __name__ == "__main__":
    app()
