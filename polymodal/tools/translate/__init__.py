"""Start scripts and config files of other training programs as recipes and commands: `polymodal translate`."""
