"""`python -m tests.golden FILE...`: model, case, largest relative errors; exit code 1 above a bound."""

import argparse
import sys
from pathlib import Path

import torch

from tests.golden.check import check


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    torch.set_num_threads(1)
    failed = 0
    for path in parser.parse_args().files:
        try:
            results = check(path)
        except Exception as error:  # the next file is still tried
            print(f"{path.name}: {type(error).__name__}: {error}")
            failed += 1
            continue
        for result in results:
            print(f"{path.name}: {result}")
            failed += not result.fine
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
