"""Runs the doctor on a config and writes its table as a result.

    python scripts/make_shape_model.py --shape 4B models/doctor-4B --logit-scale 2.5 --device cuda
    python scripts/make_shape_model.py --shape 8B models/doctor-8B --logit-scale 2.5 \
        --branch-scale 0.002 --seed 1 --device cuda
    python -m benchmarks.robustness.doctor --config configs/h200.yaml --name h200_doctor \
        student.model=models/doctor-4B scoring.model=models/doctor-8B \
        'prompts={kind: task, split: train}' verifier=null evaluation=null \
        'student.template_arguments={}' scoring.readiness_tolerance_nats=3.0

Random weights of a real shape do for the engines, but not for the check that the teacher has its
weights: their distributions are nearly uniform. So the models above have larger logits. Two lines
warn with them, because they do not know each other's text and never end an answer by themselves.

Figures: ``checks``, ``failed``, ``warned``, ``skipped``, ``seconds`` of the whole; details: every
finding. Exit status 1 if a check failed; the result is written all the same.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.lib.common import RESULTS, write_result
from qwen3_distill.config.load import load_config
from qwen3_distill.doctor.diagnosis import diagnose
from qwen3_distill.pipeline.assembly.engines import engine_interpreters
from qwen3_distill.pipeline.finding import Finding
from qwen3_distill.pipeline.manifest import engine_versions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--name", default="doctor", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    diagnosis = diagnose(
        config,
        engines=True,
        num_rollouts=arguments.rollouts,
        unquantized=None,
        say=say,
        tell=tell,
    )
    record = diagnosis.record()
    findings = record.pop("findings")
    path = write_result(
        arguments.name,
        record,
        folder=arguments.results,
        engines=engine_versions(engine_interpreters(config)),
        findings=findings,
    )
    print(path)
    if diagnosis.failed:
        sys.exit(f"{diagnosis.failed} checks failed")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def tell(finding: Finding) -> None:
    print(f"{finding.status.value:4}  {finding.name:28}  {finding.verdict.text}", flush=True)


if __name__ == "__main__":
    main()
