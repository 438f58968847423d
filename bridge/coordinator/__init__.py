"""The coordinator: plans, two-phase commit, rollback and health over all engines of a bridge."""
