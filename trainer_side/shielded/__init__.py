"""Run a model's forward without touching the model: a copy of its modules over the same weights, and guards."""
