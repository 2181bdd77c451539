from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from tests.clip_files import write_clip


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an Inception that was never trained, in the layout of the published file."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with (
        torch.random.fork_rng(),
        patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
        patch.object(nn.Conv2d, "reset_parameters"),
        patch.object(nn.Linear, "reset_parameters"),
    ):
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("any", ["2048"], str(path))
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)  # else nothing reaches the last layer
        nn.init.normal_(network.fc.weight, std=0.1)
        nn.init.zeros_(network.fc.bias)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP with random weights."""
    return write_clip(tmp_path_factory.mktemp("clip") / "small")
