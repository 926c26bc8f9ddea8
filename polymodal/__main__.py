"""`python -m polymodal` is the `polymodal` command; the launcher starts its processes this way."""

from polymodal.cli import main

if __name__ == "__main__":
    main()
