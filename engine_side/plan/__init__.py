"""Plans: trace an engine's own loader, then choose one strategy per module by experiment."""
