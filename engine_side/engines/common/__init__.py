"""Parts that the connectors of several engines share."""
