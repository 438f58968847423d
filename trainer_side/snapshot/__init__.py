"""Snapshots: cast, digest and check the trainer's tensors into an arena slot."""
