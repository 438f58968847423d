"""`weighbridge bench`: pushes measured against plain copies and engines' own reloads."""
