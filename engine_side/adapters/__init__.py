"""The engine-adapter protocol and who fills it."""
