"""Messages between trainer, coordinator, engine services and ranks, and the ports that carry them. Knows no engine."""
