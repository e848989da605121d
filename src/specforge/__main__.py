"""``python -m specforge``: the command line."""

from specforge.cli.main import main

if __name__ == "__main__":
    main()
