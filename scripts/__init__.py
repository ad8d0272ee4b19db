"""Scripts of the repository. `lab` makes the lab models."""
