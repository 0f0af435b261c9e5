"""``python -m jwins`` is the same as ``jwins``."""

from jwins.cli.app import main

if __name__ == "__main__":
    main()
