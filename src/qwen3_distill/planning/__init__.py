"""Plans how one device's memory is divided among the engines, before anything starts.

Entry point: `plan.make_plan`. `device` asks how much memory is free, `memory` sizes every piece,
`table` prints the plan. Nothing here allocates memory or touches the GPU.
"""
