"""Frozen values of a model version, a plan and a receipt. No I/O."""
