"""`python -m grn_lightning` is `grn`."""

from grn_lightning import cli


def main() -> None:
    """Run the command line; what it returns is for callers in Python, not for the shell."""
    cli.main()


if __name__ == "__main__":
    main()
