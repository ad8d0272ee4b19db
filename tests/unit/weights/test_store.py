"""The weight store without Ray: what a node writes is what was sent, or nothing is served."""

import asyncio
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_distill.errors import EngineLost, WeightVersionError
from qwen3_distill.hosts.ray_host import write_checked
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.ports import FullWeights, reaches
from qwen3_distill.types import WeightVersion
from qwen3_distill.weights.directory import DirectoryChannel
from qwen3_distill.weights.store import SharedFolderChannel, StoreChannel, deliver

TENSORS = {"layer.weight": torch.arange(12.0).reshape(3, 4)}
VERSION = WeightVersion(step=2, digest=weights_digest(TENSORS))


def test_a_pickled_store_publishes_into_the_same_files(tmp_path: Path) -> None:
    store = StoreChannel(tmp_path)
    there: StoreChannel = pickle.loads(pickle.dumps(store))
    there.publish(VERSION, FullWeights(tensors=TENSORS))
    fetched = store.fetch(VERSION).tensors
    assert torch.equal(fetched["layer.weight"], TENSORS["layer.weight"])


def test_a_node_that_got_another_file_keeps_none(tmp_path: Path) -> None:
    content = np.arange(100, dtype=np.uint8)
    digests = {"step/model.safetensors": hashlib.blake2b(content.data).hexdigest()}
    write_checked(tmp_path / "good", digests, ["step/model.safetensors"], (content,))
    assert (tmp_path / "good/step/model.safetensors").read_bytes() == content.tobytes()
    damaged = content.copy()
    damaged[17] ^= 1
    with pytest.raises(EngineLost, match=r"model.safetensors arrived with digest"):
        write_checked(tmp_path / "bad", digests, ["step/model.safetensors"], (damaged,))
    assert not (tmp_path / "bad/step/model.safetensors").exists()


def test_only_channels_that_reach_a_cluster_are_delivered(tmp_path: Path) -> None:
    host: Any = type("Elsewhere", (), {"name": "replica on another node"})()
    near = DirectoryChannel(tmp_path)
    assert not reaches(near, "cluster")
    with pytest.raises(WeightVersionError, match="reaches no further than this machine"):
        asyncio.run(deliver(VERSION, near, host))
    shared = SharedFolderChannel(tmp_path)
    assert asyncio.run(deliver(VERSION, shared, host)) is shared
    assert reaches(StoreChannel(tmp_path), "cluster")
