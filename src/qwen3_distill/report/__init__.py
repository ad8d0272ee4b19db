"""Writes ``report.html`` from the files of a run folder.

Entry point: `report.report.write_report`. `run_files` reads the folder; `result_section`,
`figures`, `time_section`, `fleet_section`, `timeline` and `rollout_view` prepare the sections;
`charts` and `drawing` make the SVG, also for the benchmarks. Nothing here needs torch or the
network.
"""
