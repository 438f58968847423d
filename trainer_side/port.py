"""`TrainerSide`: everything one Bridge needs from the trainer's process, behind `bridge.ports.TrainerPort`."""
