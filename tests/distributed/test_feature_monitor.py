"""The monitor in every kind of layout: the activations are the model's own, and training's not
disturbed."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.tokenizer import load_tokenizer
from l2e.analysis.activations import watch
from l2e.analysis.features import read_features
from l2e.analysis.monitor import Monitor
from l2e.analysis.networks import Network
from launch.training.feature_monitor import FeatureMonitor
from tests.distributed.checkpointing import SEQUENCE, make_config, running, train
from tests.distributed.processes import run_on_processes
from tests.launch.models import byte_tokenizer
from tests.tiny_models import counterpart

SETTINGS = {
    1: {"one process": {"zero": 0}},
    2: {
        "zero-3": {"zero": 3},
        "tensor": {"tensor": 2},
        "pipeline": {"pipeline": 2, "micro": 2},
        "recomputed": {"zero": 2, "recompute": True},
    },
}
TOKENS = SEQUENCE - 4  # so that stages exchange other shapes than in training
PASSAGES = 7
NAMES = [name for settings in SETTINGS.values() for name in settings]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """Passages of three features, each of its own letters, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("features")
    draw = random.Random(0)
    letters = {"vowels": "aeiou", "digits": "0123456789", "marks": ".,;:!?"}
    rows = [
        {"text": "".join(draw.choices(alphabet, k=draw.randint(6, 30))), "feature": feature}
        for feature, alphabet in letters.items()
        for _ in range(PASSAGES + 1)
    ]
    path = folder / "letters.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, byte_tokenizer(folder)


def measure_and_train(features: Path, tokenizer: Path, settings: dict[str, dict]) -> dict:
    """For each setting: what was measured after two steps, and the losses of all four."""
    outcomes = {}
    wanted = {"features": str(features), "passages": PASSAGES, "tokens": TOKENS}
    for name, keys in settings.items():
        monitored = {"method": "regularize", "layers": "all", "late_start_step": 2}
        watched = make_config(**keys, l2e=monitored, monitor=wanted)
        with running(watched) as engine:
            monitor = FeatureMonitor(engine.config, engine, tokenizer)
            losses = train(engine, 0, 2)
            state = None
            if name == "one process":
                state = {key: value.detach().clone() for key, value in engine.named_parameters()}
            found = monitor.measure()
            losses += train(engine, 2, 2)
        with running(make_config(**keys, l2e=monitored)) as engine:
            undisturbed = train(engine, 0, 4)
        outcomes[name] = {
            "layers": found["monitor"],
            "seconds": found["monitor_seconds"],
            "losses": (losses, undisturbed),
            "state": state,
        }
    return outcomes


@pytest.fixture(scope="module")
def outcomes(files, tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("monitor")
    found: dict[str, dict] = {}
    for count, settings in SETTINGS.items():
        found |= run_on_processes(measure_and_train, count, folder, *files, settings)[0]
    return found


@pytest.fixture(scope="module")
def expected(files, outcomes) -> dict:
    """The monitor's numbers of transformers' model with the same weights."""
    config = make_config().model
    model = counterpart(config, outcomes["one process"]["state"])
    network = Network(model, SimpleNamespace(), "theirs")  # type: ignore[arg-type]

    def observe(tokens, hook):
        with torch.no_grad(), watch(network, lambda layer, _, post: hook(str(layer), post)):
            model(tokens)

    features, tokenizer = files
    passages = read_features(features).sample(PASSAGES)
    monitor = Monitor(passages, load_tokenizer(tokenizer), batch_size=1, max_tokens=TOKENS)
    return monitor.run(observe)["layers"]


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_those_of_the_models_own_activations(outcomes, expected, name):
    layers = outcomes[name]["layers"]
    assert layers.keys() == expected.keys() == {"0", "1"}
    for number, numbers in expected.items():
        assert layers[number]["mean_ms"] == pytest.approx(numbers["mean_ms"], rel=1e-3)
        assert layers[number]["ks"] == pytest.approx(numbers["ks"], abs=5e-3)
        # One entry of the 2 % that are counted may fall on either side of the threshold.
        assert layers[number]["fkr"] == pytest.approx(numbers["fkr"], abs=1 / 60)
    assert outcomes[name]["seconds"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_as_if_nobody_had_looked(outcomes, name):
    losses, undisturbed = outcomes[name]["losses"]
    assert losses == undisturbed
