"""lm-evaluation-harness on models in memory or on disk, with the official scores beside ours."""
