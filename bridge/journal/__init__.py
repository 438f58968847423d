"""State that survives the daemon: the ledger with its journal, the trainer's lease, and the folder of both."""
