"""The console command as `python -m polymodal.compat`."""

from polymodal.compat.command import main

if __name__ == "__main__":
    main()
