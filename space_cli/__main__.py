"""`python -m space_cli` is the command `space`."""

from space_cli.cli.app import main

if __name__ == "__main__":
    main()
