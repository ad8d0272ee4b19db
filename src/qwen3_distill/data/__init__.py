"""Prompts in, rollout files in and out, and the check of answers.

`sources` reads raw prompts, `prompts` renders them with the student's chat template, `tasks` names
the lab models' tasks. `rollout_files` writes and reads Parquet. `verifiers` grades
responses. Nothing here imports a model or an engine.
"""
