"""Files in shared memory: the arena, its seals, the mailbox, and the removal of orphans."""
