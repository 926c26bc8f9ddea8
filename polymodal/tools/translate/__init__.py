"""Start scripts and config files of other training programs as recipes: `polymodal translate`."""
