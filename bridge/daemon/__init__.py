"""The daemon's life on Ray: find, start and stop a cluster (`ray_cluster`) and our actors on it (`actors`)."""
