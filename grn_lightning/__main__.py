"""`python -m grn_lightning` is `grn`."""

from grn_lightning.cli import main

if __name__ == "__main__":
    main()
