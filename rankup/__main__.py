"""`python -m rankup` is the same as `rankup`."""

from rankup.cli import main

if __name__ == "__main__":
    main()
