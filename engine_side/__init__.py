"""The engine's side: the arena's bytes -> live parameters, proven."""
