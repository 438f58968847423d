"""What must survive the daemon: the ledger, the trainer's lease, and the folder that holds both."""
