"""Checkpoints as folders of files: written safely, verified, and read without an engine."""
