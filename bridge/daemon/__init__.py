"""The daemon's life on Ray: find or start a cluster, start and stop actors."""
