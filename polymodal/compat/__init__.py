"""`polymodal-compat`: the documented commands of MindSpeed-MM, as they are written, run by ours.

A command line is translated (`tools.translate`) and becomes one recipe and one of our commands, in the
process that torchrun started.
"""
