"""Other systems' weight layouts to and from the hub's: one table a family, one engine for every direction.

Training does not need it and does not import it: the command line registers recognise.py's reader of trees
and DCP directories.
"""
