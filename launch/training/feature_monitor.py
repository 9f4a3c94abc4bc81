"""Monosemantic Scale and FKR of the model in training, on a few passages of a feature file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs import Config
from data.tokenizer import load_tokenizer
from launch.engine.engine import Engine

LEAST_INTERVAL = 100  # curves need no more points than this


class FeatureMonitor:
    """What the configuration's section `monitor` asks for; every rank of the run takes part."""

    def __init__(self, config: Config, engine: Engine, tokenizer: Path | None) -> None:
        """Raises ValueError if the feature file or the tokenizer is missing or of no use."""
        from l2e.analysis.features import read_features  # scipy and scikit-learn take a second
        from l2e.analysis.monitor import Monitor

        assert config.monitor.features is not None
        if tokenizer is None:
            raise ValueError("monitor.features: the corpus names no tokenizer; set tokenizer.path")
        train, length = config.train, config.data.sequence_length
        self.engine = engine
        self.monitor = Monitor(
            read_features(config.monitor.features).sample(config.monitor.passages),
            load_tokenizer(tokenizer),
            batch_size=train.micro_batch_size,
            max_tokens=min(config.monitor.tokens, length),
        )
        tokens_a_replica = train.global_batch_size * length // engine.layout.data_size
        cheap = self.monitor.interval(tokens_a_replica)
        self.interval = config.monitor.interval or max(LEAST_INTERVAL, cheap)

    def __str__(self) -> str:
        features = self.monitor.features
        return (
            f"monitor: scale and fkr of {len(features)} passages of {len(features.names)} features "
            f"({features.name}), every {self.interval} steps"
        )

    def measure(self) -> dict[str, Any]:
        """{"monitor": {block number: {mean_ms, ks, fkr}}, "monitor_seconds"}; collective."""
        found = self.monitor.run(self.engine.observe, self.engine.gather_neurons)
        layers = self.engine.of_all_stages(found["layers"])
        return {"monitor": layers, "monitor_seconds": found["seconds"]}
