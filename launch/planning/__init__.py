"""What a run costs and which layout suits it, from its configuration alone."""
