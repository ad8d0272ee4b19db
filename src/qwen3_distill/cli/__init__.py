"""The command line; `main.main` is the entry point, each other file has a group of commands.

A command reads its config first and imports what is slow after that. It decides nothing itself.
"""
