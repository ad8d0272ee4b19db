"""Plans how one device's memory is divided among the engines, and predicts a run's time.

Memory: `plan.make_plan`. `device` asks how much is free, `memory` sizes every piece, `table` prints
the plan. Time: `time_plan.plan_time`, by the formulas of `roofline` with the rates of `rates`;
`suggest` searches with both. Only `calibrate` and `speed_probe` allocate memory or touch the GPU.
"""
