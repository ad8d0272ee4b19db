"""The plugins of SGLang's servers: found by their interface, what they set, what they select."""

import importlib.metadata
import multiprocessing
import subprocess
import sys
from enum import Enum, auto
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qwen3_distill.config import SglangScoring
from qwen3_distill.scoring.sglang import in_server
from qwen3_distill.scoring.sglang.in_server import BLOCK, THRESHOLDS, Rows
from qwen3_distill.scoring.sglang.plugin import COLLECTION, SELECTION, write_plugins
from qwen3_distill.scoring.sglang.server import SglangServer

LOAD = """
import gc
import sys
from importlib.metadata import entry_points
for plugin in entry_points(group="sglang.srt.plugins"):
    if plugin.name.startswith("qwen3_distill"):
        plugin.load()()
print(gc.get_threshold(), "qwen3_distill" in sys.modules)
"""
QWEN3 = 151_936


def entries_of(folder: Path) -> list[tuple[str, str]]:
    (found,) = importlib.metadata.distributions(path=[str(folder)])
    return [(each.group, each.value.split(":")[1]) for each in found.entry_points]


def test_they_are_found_by_sglangs_group_of_plugins(tmp_path: Path) -> None:
    folder = write_plugins(tmp_path / "plugin", COLLECTION, SELECTION)
    assert entries_of(folder) == [
        ("sglang.srt.plugins", "collect_rarely"),
        ("sglang.srt.plugins", "select_by_blocks"),
    ]
    again = write_plugins(folder, COLLECTION, SELECTION)  # as at a restart of the server
    assert again == folder


def test_the_thresholds_are_set_without_this_package_and_said(tmp_path: Path) -> None:
    folder = write_plugins(tmp_path, COLLECTION, SELECTION)
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    said, after = done.stdout.splitlines()
    assert said == f"garbage collection: thresholds {THRESHOLDS} in MainProcess"
    assert after == f"{THRESHOLDS} False"


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ({}, ["collect_rarely", "select_by_blocks"]),
        ({"gc-threshold": "700"}, ["select_by_blocks"]),
        ({"gc_threshold": "700"}, ["select_by_blocks"]),
    ],
)
def test_thresholds_of_the_user_are_kept(
    tmp_path: Path, arguments: dict[str, Any], written: list[str]
) -> None:
    values = {"kind": "sglang", "model": "m", "server_arguments": arguments}
    server = SglangServer(
        SglangScoring.model_validate(values),
        context_length=8,
        memory_fraction=None,
        max_total_tokens=None,
        log=tmp_path / "log",
    )
    (folder,) = server._importable(tmp_path)
    assert [name for _, name in entries_of(Path(folder))] == written


# --- The selection ------------------------------------------------------------------------------


def rows_of(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [0, 1, 16, 64])
@pytest.mark.parametrize("size", [QWEN3, 100 * BLOCK, 100 * BLOCK + 1, BLOCK, 100])
def test_a_selection_by_blocks_finds_what_topk_finds(size: int, k: int) -> None:
    values_RV = rows_of(7, size)
    expected, found = values_RV.topk(k, dim=1), Rows(values_RV).topk(k, dim=1)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices)


def test_the_largest_may_all_lie_in_one_block_or_each_in_its_own() -> None:
    values_RV = rows_of(2, QWEN3)
    together, apart = torch.arange(16) + 5 * BLOCK, torch.arange(16) * 7 * BLOCK + 3
    values_RV[0, together] += 100
    values_RV[1, apart] += 100
    _, columns = Rows(values_RV).topk(16, dim=1)
    assert sorted(columns[0].tolist()) == together.tolist()
    assert sorted(columns[1].tolist()) == apart.tolist()


def test_of_equal_values_any_are_named_but_none_twice() -> None:
    values_RV = rows_of(20, QWEN3).bfloat16()  # some thousand different values
    expected, found = values_RV.topk(16, dim=1).values, Rows(values_RV).topk(16, dim=1)
    assert torch.equal(found.values, expected)
    assert torch.equal(values_RV.gather(1, found.indices), expected)
    assert all(len(set(row)) == 16 for row in found.indices.tolist())


def test_columns_are_selected_as_the_tensor_does() -> None:
    values_RV = rows_of(20, QWEN3)
    assert torch.equal(Rows(values_RV).topk(3, dim=0).indices, values_RV.topk(3, dim=0).indices)


def test_a_selection_of_no_rows_is_empty() -> None:
    values, columns = Rows(torch.empty(0, QWEN3)).topk(16, dim=1)
    assert values.shape == columns.shape == (0, 16)


def test_tokens_that_cannot_be_are_never_found_twice() -> None:
    values_RV = torch.full((3, QWEN3), -torch.inf)
    values_RV[:, [4, 90_000]] = 0.0
    _, columns = Rows(values_RV).topk(16, dim=1)
    assert (columns < QWEN3).all()
    assert all(len(set(row)) == 16 for row in columns.tolist())
    assert set(columns[0, :2].tolist()) == {4, 90_000}


def test_large_vocabularies_are_not_selected_from_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, selected = list[int](), torch.Tensor.topk

    def watched(tensor: torch.Tensor, k: int, dim: int = -1) -> Any:
        sizes.append(tensor.shape[-1])
        return selected(tensor, k, dim=dim)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    Rows(rows_of(3, QWEN3)).topk(16, dim=1)
    assert sizes == [QWEN3 // BLOCK, 16 * BLOCK]


def test_everything_else_is_the_tensors_own() -> None:
    values_RV = rows_of(3, 5)
    assert Rows(values_RV).shape == (3, 5)
    assert torch.equal(Rows(values_RV).float(), values_RV)


class HookType(Enum):
    BEFORE = auto()


@pytest.mark.parametrize("is_child", [True, False])
def test_only_processes_with_a_model_get_the_selection(
    is_child: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registered = list[tuple[str, Any, HookType]]()

    class HookRegistry:
        @classmethod
        def register(cls, target: str, hook: Any, kind: HookType) -> None:
            registered.append((target, hook, kind))

    module = ModuleType("hook_registry")
    vars(module).update(HookRegistry=HookRegistry, HookType=HookType)
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", module)
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: is_child or None)
    in_server.select_by_blocks()
    assert len(registered) == is_child
    assert ("selected by blocks" in capsys.readouterr().out) == is_child
    for target, hook, kind in registered:
        assert target == "sglang.srt.layers.logprob_processor.get_top_logprobs_chunk"
        assert kind is HookType.BEFORE
        positional, named = hook("logits", [16], [3], split=0)
        assert isinstance(positional[0], Rows)
        assert (positional[1:], named) == (([16], [3]), {"split": 0})
