"""What each command of `deepfake` does, a function per command: from options to exit status.

`deepfake_core.cli` holds the parser.
"""
