"""Secrets of a config: left out of what is written, and asked for again."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config.load import check_config, dump_config, load_config
from qwen3_distill.config.redaction import NOT_RECORDED, not_recorded, recordable
from qwen3_distill.errors import ConfigError

SECRETS = ("s3cret-variable", "s3cret-password", "s3cret-admin", "s3cret-token")


def values(**scoring: Any) -> dict[str, Any]:
    return {
        "output_dir": "runs/x",
        "steps": 1,
        "prompts_per_step": 1,
        "student": {"model": "m"},
        "prompts": {"kind": "jsonl", "path": "a.jsonl"},
        "sampling": {"max_new_tokens": 8},
        "generation": {
            "kind": "vllm",
            "environment": {"A": SECRETS[0], "EMPTY": ""},
            "engine_arguments": {"hf_token": SECRETS[3], "hf_overrides": {"a": 1}},
        },
        "scoring": {
            "kind": "sglang",
            "model": "t",
            "urls": [f"http://me:{SECRETS[1]}@host:1"],
            "server_arguments": {"admin-api-key": SECRETS[2], "watchdog-timeout": 600},
            **scoring,
        },
        "training": {"kind": "embedded"},
        "objective": {"kind": "sampled_reverse_kl"},
    }


def recorded() -> dict[str, Any]:
    return recordable(dump_config(check_config(values())))


def test_nothing_secret_is_recorded() -> None:
    text = json.dumps(recorded())
    assert not [secret for secret in SECRETS if secret in text]
    assert recorded()["generation"]["environment"] == {"A": NOT_RECORDED, "EMPTY": NOT_RECORDED}
    assert recorded()["generation"]["engine_arguments"]["hf_overrides"] == {"a": 1}
    assert recorded()["scoring"]["server_arguments"]["watchdog-timeout"] == 600
    assert recorded()["scoring"]["urls"] == ["http://(hidden)@host:1"]


def test_what_is_recorded_is_a_config_and_stays_the_same() -> None:
    assert recordable(recorded()) == recorded()
    assert recordable(dump_config(check_config(recorded()))) == recorded()


def test_a_run_is_not_started_on_what_was_left_out(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(recorded()))
    left_out = not_recorded(recorded())
    assert left_out == [
        *("generation.environment.A", "generation.environment.EMPTY"),
        *("generation.engine_arguments.hf_token", "scoring.urls"),
        "scoring.server_arguments.admin-api-key",
    ]
    with pytest.raises(ConfigError, match=r"does not keep generation\.environment\.A, .*=VALUE"):
        load_config(file)
    load_config(file, for_records=True)
    given = [f"{key}=x" for key in left_out if key != "scoring.urls"]
    settings = load_config(file, [*given, "scoring.urls=[http://a:b@host]"])
    assert settings.generation.kind == "vllm"
    assert settings.generation.environment["A"] == "x"


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [
        ({"environment": "TOKEN=s3cret"}, []),
        ({"environment": ["s3cret"]}, []),
        ({"environment": {"HF_TOKEN": ["s3cret"]}}, []),
        ({"environment": {"A": "s3cret\0"}}, []),
        ({"urls": [["s3cret"]]}, []),
        ({"api_key_file": {"key": "s3cret"}}, []),
        ({"server_arguments": {"api-key": "s3cret"}}, []),
        ({"server_arguments": {"admin-api-key": ["s3cret"]}}, []),
        ({}, ["scoring.environment.HF_TOKEN:s3cret"]),
        ({}, ['scoring.environment.HF_TOKEN="s3cret\\q"']),
        ({"environment": {"A": "s3cret"}}, ["scoring.environment.A.B=s3cret"]),
        ({}, ["scoring.urls=[http://me:s3cret@host:99999]"]),
        ({}, ["scoring.model=http://me:s3cret@host"]),
        ({}, ["scoring=http://me:s3cret@host"]),
        ({}, ["generation.engine_arguments={hf_token: s3cret"]),
    ],
)
def test_no_config_error_shows_a_secret(
    changes: dict[str, Any], overrides: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(values() | {"scoring": values()["scoring"] | changes}))
    with pytest.raises(ConfigError) as error:
        load_config(file, overrides)
    assert "s3cret" not in str(error.value)


def test_an_error_of_yaml_shows_the_place_and_not_the_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text('a: 1\nHF_TOKEN: "s3cret\\q"\n')
    with pytest.raises(ConfigError, match="line 2") as error:
        load_config(file)
    assert "s3cret" not in str(error.value)
