"""`python -m loftq_cli` is `loftq`."""

from loftq_cli.cli.start import main

if __name__ == "__main__":
    main()
