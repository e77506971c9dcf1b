"""The commands of `seg-attn` that need no trainer: each module has `add_arguments(parser)` and `run(args) -> int`."""
