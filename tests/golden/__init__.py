"""Own nets against numbers that the published implementations gave: `python -m tests.golden FILE...`."""
