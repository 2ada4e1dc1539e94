"""`python -m crucible`: the same as `crucible`."""

from crucible.cli import main

if __name__ == "__main__":
    main()
