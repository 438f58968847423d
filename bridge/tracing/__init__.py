"""Trace a loader or a name conversion on meta tensors: which source element lands where."""
