"""Makes the engines' virtual environments: `make.py` and the files that say what they hold.

`make.py` runs as a script of its own, with the standard library only. Nothing here is imported by
the rest of the package.
"""
