"""The engine side beside an engine's handle: serve the coordinator's requests, ask the ranks, check outputs."""
