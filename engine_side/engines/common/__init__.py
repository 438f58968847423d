"""Parts that the drivers and rank hosts of several engines share."""
