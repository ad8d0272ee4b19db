"""Outcomes of suites are counted as pytest wrote them."""

from pathlib import Path

from benchmarks.lib.junit_outcomes import outcomes

JUNIT = """<testsuites><testsuite name="pytest">
  <testcase name="a"/>
  <testcase name="b"><failure message="assert 1 == 2"/></testcase>
  <testcase name="c"><error message="fixture"/></testcase>
  <testcase name="d"><skipped message="no GPU"/></testcase>
  <testcase name="e"><system-out>text</system-out></testcase>
</testsuite></testsuites>"""


def test_errors_count_as_failed_and_skipped_as_neither(tmp_path: Path) -> None:
    (tmp_path / "vllm.xml").write_text(JUNIT)
    assert outcomes([tmp_path / "vllm.xml"]) == {"vllm": {"passed": 2, "failed": 2, "skipped": 1}}
    assert outcomes([]) == {}
