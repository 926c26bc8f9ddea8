"""Other systems' weight layouts to and from the hub's: one table a family, one engine for every direction.

Nothing here is needed for training. Sees models/ and errors; models and train do not see it (reading.py hands
them a reader of foreign trees, registered by the command line)."""
