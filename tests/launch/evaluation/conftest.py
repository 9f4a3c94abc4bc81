"""A small model to score, and the items of a task."""

from pathlib import Path

import pytest
import torch

from launch.evaluation import models
from tests.launch.models import huggingface_model, write_sciq


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    huggingface_model(folder)
    return folder


@pytest.fixture(scope="session")
def model(model_folder) -> models.Scored:
    return models.from_huggingface(model_folder, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="session")
def task_data(tmp_path_factory) -> Path:
    return write_sciq(tmp_path_factory.mktemp("tasks")).parent
