"""The engine side inside each worker process: run rank jobs, load weights and LoRA adapters."""
