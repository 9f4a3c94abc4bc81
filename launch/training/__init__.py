"""The training loop: what it reads, records, watches, and how it ends."""
