"""Small helpers without torch: whole files, derived seeds, signals, tasks, batches.

Nothing here knows a record, an engine or the config.
"""
