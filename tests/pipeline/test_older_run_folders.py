"""Run folders that the version before wrote: their rollout files have no sampled spans."""

from pathlib import Path

import pyarrow.parquet as pq

from qwen3_distill.data.rollout_files import VERSION_KEY
from qwen3_distill.utils.files import write_json_atomic
from tests.pipeline.builders import EVALUATION, call_cli, read_json, run_to_end, tiny_config
from tests.pipeline.test_resume import crash_at
from tests.tiny_models import TinyModels


def as_schema_2(path: Path) -> None:
    """Rewrite a rollout file as the version before would have written it."""
    table = pq.read_table(path).drop_columns(["sampled"])
    pq.write_table(table.replace_schema_metadata({VERSION_KEY: b"2"}), path)


def test_the_report_of_an_older_run_is_the_same(
    tiny_models: TinyModels, run_dir: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_models, run_dir, {"steps": 2})
    run_to_end(config)
    pages = [tmp_path / "newer.html", tmp_path / "older.html"]
    assert call_cli("report", run_dir, "--out", pages[0]).code == 0
    files = list((run_dir / "rollouts").glob("step-*.parquet"))
    assert files
    for file in files:
        as_schema_2(file)
    assert call_cli("report", run_dir, "--out", pages[1]).code == 0
    assert pages[0].read_bytes() == pages[1].read_bytes()
    result = call_cli("run", "--config", run_dir / "config.json")  # which is complete
    assert (result.code, result.err) == (0, "")


def test_a_run_from_before_a_setting_existed_goes_on(
    tiny_models: TinyModels, run_dir: Path
) -> None:
    config = tiny_config(tiny_models, run_dir, {"steps": 3, "evaluation": EVALUATION})
    crash_at(config, 2)
    values = read_json(run_dir / "config.json")
    del values["evaluation"]["second_temperature"]
    write_json_atomic(run_dir / "config.json", values)
    run_to_end(config)
