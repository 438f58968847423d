"""Verification: compare live parameters with the arena, level by level."""
